//! The mesh config entry: what holds for every proxy.

use super::{Bad, Notes};
use crate::consul::api;
use crate::snapshot::{EscapedSlashes, Normalization, Underscores};
use crate::tls::{Parameters, Policy, Versions, is_known_suite};

/// What of the entry concerns us. Without an entry, and under agents that have no such kind, the defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::control) struct MeshSettings {
    pub(in crate::control) tls: Policy,
    pub(in crate::control) normalization: Normalization,
    pub(in crate::control) sanitize_forwarded_cert: bool,
}

/// # Errors
/// When it asks of TLS what is not known here, so that peers could agree on less than was asked for.
pub(in crate::control) fn settings(wire: Option<&api::MeshConfig>, notes: &mut Notes) -> Result<MeshSettings, Bad> {
    let Some(wire) = wire else { return Ok(MeshSettings::default()) };
    let direction = |name: &str, wire: Option<&api::MeshTlsDirection>, notes: &mut Notes| {
        wire.map_or_else(|| Ok(Parameters::default()), |wire| parameters(wire, name, notes))
    };
    let tls = wire.tls.as_ref();
    let http = wire.http.as_ref();
    let normalization = http.and_then(|http| http.incoming.as_ref()?.request_normalization.as_ref());
    Ok(MeshSettings {
        tls: Policy {
            incoming: direction("Incoming", tls.and_then(|tls| tls.incoming.as_ref()), notes)?,
            outgoing: direction("Outgoing", tls.and_then(|tls| tls.outgoing.as_ref()), notes)?,
        },
        normalization: normalization.map_or_else(Normalization::default, |wire| self::normalization(wire, notes)),
        sanitize_forwarded_cert: http.is_some_and(|http| http.sanitize_x_forwarded_client_cert),
    })
}

fn parameters(wire: &api::MeshTlsDirection, direction: &str, notes: &mut Notes) -> Result<Parameters, Bad> {
    Ok(Parameters {
        versions: versions(&wire.tls_min_version, &wire.tls_max_version, direction, notes)?,
        cipher_suites: suites(&wire.cipher_suites, direction, notes)?,
    })
}

/// The nearest that can be done: nothing below TLS 1.2 is ever spoken. A version that is not known may be one above
/// those that are.
fn versions(lowest: &str, highest: &str, direction: &str, notes: &mut Notes) -> Result<Versions, Bad> {
    for (bound, text) in [("TLSMinVersion", lowest), ("TLSMaxVersion", highest)] {
        match text {
            "" | "TLS_AUTO" | "TLSv1_2" | "TLSv1_3" => {}
            "TLSv1_0" | "TLSv1_1" => {
                notes.push(format!("mesh config entry: TLS.{direction}.{bound} {text:?} becomes TLSv1_2"));
            }
            _ => return Err(Bad(format!("its TLS.{direction}.{bound} {text:?} is not known"))),
        }
    }
    Ok(match (lowest, highest) {
        ("TLSv1_3", _) => Versions::Tls13,
        (_, "" | "TLS_AUTO" | "TLSv1_3") => Versions::Both,
        _ => Versions::Tls12,
    })
}

fn suites(names: &[String], direction: &str, notes: &mut Notes) -> Result<Vec<String>, Bad> {
    let (known, unknown): (Vec<&String>, Vec<&String>) = names.iter().partition(|name| is_known_suite(name));
    if known.is_empty() && !unknown.is_empty() {
        return Err(Bad(format!("of its TLS.{direction}.CipherSuites, none is supported: {unknown:?}")));
    }
    if !unknown.is_empty() {
        notes.push(format!(
            "mesh config entry: of TLS.{direction}.CipherSuites, {unknown:?} are not supported and left out"
        ));
    }
    Ok(known.into_iter().cloned().collect())
}

fn normalization(wire: &api::RequestNormalization, notes: &mut Notes) -> Normalization {
    if wire.insecure_disable_path_normalization {
        notes.push(
            "mesh config entry: InsecureDisablePathNormalization is set, so rules match paths as they are written: \
             another spelling of a path (/%61dmin) or of a header's name (x_role) bypasses a rule (a deny of /admin or of x-role)"
                .to_owned(),
        );
    }
    Normalization {
        path: !wire.insecure_disable_path_normalization,
        merge_slashes: wire.merge_slashes,
        escaped_slashes: match wire.path_with_escaped_slashes_action.as_str() {
            "" | "IMPLEMENTATION_SPECIFIC_DEFAULT" | "KEEP_UNCHANGED" => EscapedSlashes::Keep,
            "REJECT_REQUEST" => EscapedSlashes::Reject,
            "UNESCAPE_AND_REDIRECT" => EscapedSlashes::Redirect,
            "UNESCAPE_AND_FORWARD" => EscapedSlashes::Forward,
            other => {
                notes.push(format!(
                    "mesh config entry: PathWithEscapedSlashesAction {other:?} is not known, so such requests are refused"
                ));
                EscapedSlashes::Reject
            }
        },
        underscores: match wire.headers_with_underscores_action.as_str() {
            "" | "ALLOW" => Underscores::Allow,
            "REJECT_REQUEST" => Underscores::Reject,
            "DROP_HEADER" => Underscores::Drop,
            other => {
                notes.push(format!(
                    "mesh config entry: HeadersWithUnderscoresAction {other:?} is not known, so such headers are dropped"
                ));
                Underscores::Drop
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The settings, and how often something was noted.
    fn read(wire: Value) -> (MeshSettings, usize) {
        let mut notes = Notes::default();
        let wire: api::MeshConfig = serde_json::from_value(wire).unwrap();
        (settings(Some(&wire), &mut notes).unwrap(), notes.take().len())
    }

    fn is_refused(wire: Value) -> bool {
        let wire: api::MeshConfig = serde_json::from_value(wire).unwrap();
        settings(Some(&wire), &mut Notes::default()).is_err()
    }

    #[test]
    fn without_an_entry_paths_are_normalised_and_no_version_is_ruled_out() {
        let defaults = settings(None, &mut Notes::default()).unwrap();
        assert_eq!(read(json!({})), (defaults.clone(), 0));
        assert!(defaults.normalization.path && !defaults.sanitize_forwarded_cert);
        assert_eq!(defaults.tls, Policy::default());
        assert_eq!(read(json!({"TLS": null, "HTTP": {"Incoming": {"RequestNormalization": {}}}})), (defaults, 0));
    }

    #[test]
    fn requests_are_normalised_as_the_entry_says() {
        let normal = |wire: Value| {
            let (settings, notes) = read(json!({"HTTP": {"Incoming": {"RequestNormalization": wire}}}));
            (settings.normalization, notes)
        };
        let default = Normalization::default();
        let slashes = |escaped_slashes| Normalization { escaped_slashes, ..default };
        let underscores = |underscores| Normalization { underscores, ..default };
        for (field, value, expected, noted) in [
            ("InsecureDisablePathNormalization", json!(true), Normalization { path: false, ..default }, 1),
            ("MergeSlashes", json!(true), Normalization { merge_slashes: true, ..default }, 0),
            ("PathWithEscapedSlashesAction", json!("IMPLEMENTATION_SPECIFIC_DEFAULT"), default, 0),
            ("PathWithEscapedSlashesAction", json!("KEEP_UNCHANGED"), default, 0),
            ("PathWithEscapedSlashesAction", json!("REJECT_REQUEST"), slashes(EscapedSlashes::Reject), 0),
            ("PathWithEscapedSlashesAction", json!("UNESCAPE_AND_REDIRECT"), slashes(EscapedSlashes::Redirect), 0),
            ("PathWithEscapedSlashesAction", json!("UNESCAPE_AND_FORWARD"), slashes(EscapedSlashes::Forward), 0),
            ("PathWithEscapedSlashesAction", json!("NEW"), slashes(EscapedSlashes::Reject), 1),
            ("HeadersWithUnderscoresAction", json!("ALLOW"), default, 0),
            ("HeadersWithUnderscoresAction", json!("REJECT_REQUEST"), underscores(Underscores::Reject), 0),
            ("HeadersWithUnderscoresAction", json!("DROP_HEADER"), underscores(Underscores::Drop), 0),
            ("HeadersWithUnderscoresAction", json!("NEW"), underscores(Underscores::Drop), 1),
        ] {
            assert_eq!(normal(json!({ field: value })), (expected, noted), "{field} {value}");
        }
        assert!(read(json!({"HTTP": {"SanitizeXForwardedClientCert": true}})).0.sanitize_forwarded_cert);
    }

    #[test]
    fn tls_is_as_near_to_the_entry_as_can_be() {
        let direction = |wire: &Value| read(json!({"TLS": {"Incoming": wire}}));
        for (lowest, highest, versions, noted) in [
            ("", "", Versions::Both, 0),
            ("TLS_AUTO", "TLS_AUTO", Versions::Both, 0),
            ("TLSv1_0", "", Versions::Both, 1),
            ("TLSv1_2", "TLSv1_3", Versions::Both, 0),
            ("TLSv1_3", "", Versions::Tls13, 0),
            ("TLSv1_3", "TLSv1_2", Versions::Tls13, 0),
            ("", "TLSv1_2", Versions::Tls12, 0),
            ("TLSv1_0", "TLSv1_1", Versions::Tls12, 2),
        ] {
            let wire = json!({"TLSMinVersion": lowest, "TLSMaxVersion": highest});
            let (settings, notes) = direction(&wire);
            assert_eq!((settings.tls.incoming.versions, notes), (versions, noted), "{wire}");
            assert_eq!(settings.tls.outgoing, Parameters::default());
        }
        let (known, old) = ("TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", "TLS_RSA_WITH_AES_128_CBC_SHA");
        for (names, expected, noted) in [(json!([known]), vec![known], 0), (json!([old, known]), vec![known], 1)] {
            let (settings, notes) = direction(&json!({"CipherSuites": names}));
            assert_eq!(
                (settings.tls.incoming.cipher_suites, notes),
                (expected.iter().map(ToString::to_string).collect(), noted)
            );
        }
    }
    #[test]
    fn what_is_not_known_of_tls_is_refused() {
        for direction in ["Incoming", "Outgoing"] {
            for wire in [
                json!({"TLSMinVersion": "TLSv1_4"}),
                json!({"TLSMaxVersion": "tlsv1_2"}),
                json!({"CipherSuites": ["TLS_RSA_WITH_AES_128_CBC_SHA"]}),
            ] {
                assert!(is_refused(json!({"TLS": { direction: wire }})), "{direction} {wire}");
            }
            assert!(!is_refused(json!({"TLS": { direction: {"CipherSuites": []} }})));
        }
    }
}
