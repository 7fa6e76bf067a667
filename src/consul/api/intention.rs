//! Intentions, with the names of the fields that this code does not know.

strict_wire! {
    /// A row of an intentions list.
    pub struct Intention {
        /// Empty for an intention that lives in a config entry.
        #[serde(rename = "ID")]
        pub id: String,
        pub description: String,
        #[serde(rename = "SourceNS")]
        pub source_ns: String,
        pub source_name: String,
        pub source_partition: String,
        /// Not empty for a source in another cluster.
        pub source_peer: String,
        pub source_sameness_group: String,
        /// `consul` is the only type there is.
        pub source_type: String,
        #[serde(rename = "DestinationNS")]
        pub destination_ns: String,
        pub destination_name: String,
        pub destination_partition: String,
        /// `allow`, `deny`, or empty where `permissions` decide.
        pub action: String,
        pub permissions: Vec<IntentionPermission>,
        #[serde(rename = "JWT")]
        pub jwt: Option<IntentionJwt>,
        pub precedence: i64,
    }

    pub struct IntentionPermission {
        pub action: String,
        #[serde(rename = "HTTP")]
        pub http: Option<IntentionHttp>,
        #[serde(rename = "JWT")]
        pub jwt: Option<IntentionJwt>,
    }

    /// All parts that are present must match.
    pub struct IntentionHttp {
        pub path_exact: String,
        pub path_prefix: String,
        pub path_regex: String,
        pub header: Vec<IntentionHeader>,
        pub methods: Vec<String>,
    }

    pub struct IntentionHeader {
        pub name: String,
        pub present: bool,
        pub exact: String,
        pub prefix: String,
        pub suffix: String,
        pub contains: String,
        pub regex: String,
        pub invert: bool,
        pub ignore_case: bool,
    }

    pub struct IntentionJwt {
        /// Any one of them is enough.
        pub providers: Vec<IntentionJwtProvider>,
    }

    pub struct IntentionJwtProvider {
        pub name: String,
        /// All of them must hold.
        pub verify_claims: Vec<IntentionJwtClaim>,
    }

    pub struct IntentionJwtClaim {
        pub path: Vec<String>,
        pub value: String,
    }
}

/// Fields of an intention that restrict nobody (Consul 1.8.7 to 1.22, `agent/structs/intention.go`).
const INERT: [&str; 10] = [
    "DefaultAddr",
    "DefaultPort",
    "Meta",
    "LegacyMeta",
    "LegacyID",
    "CreatedAt",
    "UpdatedAt",
    "Hash",
    "CreateIndex",
    "ModifyIndex",
];

impl Intention {
    /// The name of some field of the intention itself that this code does not know. It may restrict whom the
    /// intention is about, so that one with such a field must not allow anybody.
    pub fn unknown_field(&self) -> Option<&str> {
        self.unknown.iter().find(|name| !INERT.contains(name))
    }
}

impl IntentionPermission {
    /// The name of some field, here or further in, that this code does not know; such a permission cannot
    /// be evaluated, and must not allow anything.
    pub fn unknown_field(&self) -> Option<&str> {
        let http = self.http.as_ref().and_then(IntentionHttp::unknown_field);
        let jwt = || self.jwt.as_ref().and_then(IntentionJwt::unknown_field);
        self.unknown.first().or(http).or_else(jwt)
    }
}

impl IntentionHttp {
    fn unknown_field(&self) -> Option<&str> {
        self.unknown.first().or_else(|| self.header.iter().find_map(|header| header.unknown.first()))
    }
}

impl IntentionJwt {
    /// As [`IntentionPermission::unknown_field`], for a requirement on the whole intention.
    pub fn unknown_field<'a>(&'a self) -> Option<&'a str> {
        let in_provider = |provider: &'a IntentionJwtProvider| {
            let in_claims = || provider.verify_claims.iter().find_map(|claim| claim.unknown.first());
            provider.unknown.first().or_else(in_claims)
        };
        self.unknown.first().or_else(|| self.providers.iter().find_map(in_provider))
    }
}
