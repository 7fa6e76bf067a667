//! `/certs`, in Envoy's shape.

use std::time::SystemTime;

use serde_json::{Value, json};

use super::query::Query;
use super::reply::{self, Reply};
use super::state::State;
use crate::tls::CertificateInfo;

/// One entry: our certificate with its chain, and the roots of the mesh.
pub(super) fn certs(state: &State, _: &Query) -> Reply {
    let now = SystemTime::now();
    let snapshot = state.snapshots.borrow().clone();
    let credentials = snapshot.as_ref().and_then(|snapshot| snapshot.credentials.as_ref());
    let entries = credentials.map(|credentials| {
        let about = credentials.describe();
        let list = |all: &[CertificateInfo]| all.iter().map(|one| certificate(one, now)).collect::<Vec<_>>();
        json!({ "ca_cert": list(&about.roots), "cert_chain": list(&about.chain) })
    });
    reply::json(&json!({ "certificates": entries.into_iter().collect::<Vec<_>>() }))
}

fn certificate(about: &CertificateInfo, now: SystemTime) -> Value {
    let uris = about.uris.iter().map(|uri| json!({ "uri": uri }));
    let names = uris.chain(about.dns.iter().map(|name| json!({ "dns": name })));
    let left = about.not_after.duration_since(now).map_or(0, |left| left.as_secs() / (24 * 60 * 60));
    json!({
        "path": "<inline>",
        "serial_number": about.serial,
        "subject_alt_names": names.collect::<Vec<_>>(),
        "days_until_expiration": left.to_string(),
        "valid_from": reply::timestamp(about.not_before),
        "expiration_time": reply::timestamp(about.not_after),
    })
}
