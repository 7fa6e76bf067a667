//! How wire types are declared, so that each of them is lenient alike.
//!
//! They are read field by field into a default. What `serde` derives holds each field by itself until the end, which is two to three times
//! as much code.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use super::value::Unknown;

/// Configuration that Consul passes on without looking at it.
pub type Opaque = serde_json::Map<String, serde_json::Value>;

/// Declares wire types: every field defaulted, `null` taken as the default, names in the agent's spelling, which is pascal case
/// where no other is given.
macro_rules! wire {
    ($($(#[doc = $about:literal])* pub struct $name:ident { $($fields:tt)* })*) => {
        $(wire! { @type [$($about)*] $name { $($fields)* } })*
    };
    (@type [$($about:literal)*] $name:ident {
        $($(#[doc = $doc:literal])* $(#[serde(rename = $spelling:literal)])? pub $field:ident: $type:ty,)*
        $(@unknown $unknown:ident)?
    }) => {
        $(#[doc = $about])*
        #[derive(Debug, Clone, Default, PartialEq)]
        pub struct $name {
            $($(#[doc = $doc])* pub $field: $type,)*
            $(pub $unknown: $crate::consul::api::Unknown,)?
        }

        impl $crate::consul::api::wire::Object for $name {
            fn read<'de, A: serde::de::MapAccess<'de>>(&mut self, name: &str, values: &mut A) -> Result<bool, A::Error> {
                $(if name == spelling!($field $($spelling)?) {
                    return $crate::consul::api::wire::read(&mut self.$field, values);
                })*
                Ok(false)
            }

            $(fn unknown(&mut self) -> Option<&mut $crate::consul::api::Unknown> {
                Some(&mut self.$unknown)
            })?
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::consul::api::wire::object(deserializer)
            }
        }
    };
}

/// Declares wire types that remember which fields they did not know.
macro_rules! strict_wire {
    ($($(#[doc = $about:literal])* pub struct $name:ident { $($fields:tt)* })*) => {
        $(wire! { @type [$($about)*] $name { $($fields)* @unknown unknown } })*
    };
}

/// How the agent spells a field.
macro_rules! spelling {
    ($field:ident) => {{
        const SNAKE: &str = stringify!($field);
        const PASCAL: [u8; $crate::consul::api::wire::pascal_len(SNAKE)] = $crate::consul::api::wire::pascal(SNAKE);
        const { $crate::consul::api::wire::ascii(&PASCAL) }
    }};
    ($field:ident $spelling:literal) => {
        $spelling
    };
}

/// Length of a name of snake case in pascal case.
pub(super) const fn pascal_len(snake: &str) -> usize {
    let (bytes, mut at, mut len) = (snake.as_bytes(), 0, 0);
    while at < bytes.len() {
        len += (bytes[at] != b'_') as usize;
        at += 1;
    }
    len
}

/// A name of snake case in pascal case, which has [`pascal_len`] bytes.
pub(super) const fn pascal<const LEN: usize>(snake: &str) -> [u8; LEN] {
    let (bytes, mut at, mut len) = (snake.as_bytes(), 0, 0);
    let mut pascal = [0; LEN];
    while at < bytes.len() {
        if bytes[at] != b'_' {
            let begins = at == 0 || bytes[at - 1] == b'_';
            pascal[len] = if begins { bytes[at].to_ascii_uppercase() } else { bytes[at] };
            len += 1;
        }
        at += 1;
    }
    pascal
}

pub(super) const fn ascii(bytes: &[u8]) -> &str {
    match str::from_utf8(bytes) {
        Ok(text) => text,
        Err(_) => panic!("a name of a field that is not ASCII"),
    }
}

/// A wire type, as it is read.
pub(super) trait Object: Default {
    /// Reads the value of the field that the agent calls `name`. `false`: there is no such field, and nothing is read.
    ///
    /// # Errors
    /// When the value is not what it should be.
    fn read<'de, A: MapAccess<'de>>(&mut self, name: &str, values: &mut A) -> Result<bool, A::Error>;

    /// Where the names of unknown fields are kept. `None`: nowhere.
    fn unknown(&mut self) -> Option<&mut Unknown> {
        None
    }
}

/// Reads the value of one field; always `true`. Not inlined, so that all fields of a type share it.
#[inline(never)]
pub(super) fn read<'de, T, A>(field: &mut T, values: &mut A) -> Result<bool, A::Error>
where
    T: Default + Deserialize<'de>,
    A: MapAccess<'de>,
{
    *field = values.next_value::<Option<T>>()?.unwrap_or_default();
    Ok(true)
}

/// # Errors
/// When it is no object, or a field's value is not what it should be.
pub(super) fn object<'de, T: Object, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    deserializer.deserialize_map(ObjectVisitor(PhantomData))
}

struct ObjectVisitor<T>(PhantomData<T>);

impl<'de, T: Object> Visitor<'de> for ObjectVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<T, A::Error> {
        let mut object = T::default();
        while let Some(Name(name)) = fields.next_key()? {
            if object.read(&name, &mut fields)? {
                continue;
            }
            match object.unknown() {
                Some(unknown) => unknown.read(name, &mut fields)?,
                None => _ = fields.next_value::<IgnoredAny>()?,
            }
        }
        Ok(object)
    }
}

/// The name of a field, borrowed where it is written without escapes.
struct Name<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Name<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_identifier(NameVisitor)
    }
}

struct NameVisitor;

impl<'de> Visitor<'de> for NameVisitor {
    type Value = Name<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_borrowed_str<E: Error>(self, name: &'de str) -> Result<Name<'de>, E> {
        Ok(Name(Cow::Borrowed(name)))
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Name<'de>, E> {
        Ok(Name(Cow::Owned(name.to_owned())))
    }
}
