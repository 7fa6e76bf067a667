//! How wire types are declared, so that each of them is lenient alike.

use serde::{Deserialize, Deserializer};

/// Configuration that Consul passes on without looking at it.
pub type Opaque = serde_json::Map<String, serde_json::Value>;

/// Declares a wire type: every field defaulted, `null` taken as the default, names in the agent's spelling.
macro_rules! wire {
    ($($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)* })*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, Default, PartialEq, Deserialize)]
        #[serde(rename_all = "PascalCase", default)]
        pub struct $name {
            $($(#[$field_meta])* #[serde(deserialize_with = "null_is_default")] pub $field: $type,)*
        }
    )*};
}

/// Declares a wire type that remembers which fields it did not know.
macro_rules! strict_wire {
    ($($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)* })*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, Default, PartialEq, Deserialize)]
        #[serde(rename_all = "PascalCase", default)]
        pub struct $name {
            $($(#[$field_meta])* #[serde(deserialize_with = "null_is_default")] pub $field: $type,)*
            #[serde(flatten)]
            pub unknown: Unknown,
        }
    )*};
}

pub(super) fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
