//! Registrations for tests, and what becomes of them.

use serde_json::{Value, json};

use super::super::{Bad, Notes};
use super::plan::{Definition, UpstreamPlan};
use super::registered;
use crate::snapshot::OutboundKey;

pub(super) fn read(registration: Value) -> (Result<Definition, Bad>, Vec<String>) {
    let mut notes = Notes::default();
    let service = serde_json::from_value(registration).unwrap();
    (registered(&service, false, &mut notes), notes.take())
}

pub(super) fn sidecar(service: Value, proxy: Value) -> (Definition, Vec<String>) {
    let mut registration = json!({"Kind": "connect-proxy", "ID": "web-sidecar-proxy", "Port": 21000});
    let mut whole = json!({"DestinationServiceName": "web", "LocalServicePort": 8080});
    registration.as_object_mut().unwrap().extend(service.as_object().unwrap().clone());
    whole.as_object_mut().unwrap().extend(proxy.as_object().unwrap().clone());
    registration["Proxy"] = whole;
    let (definition, notes) = read(registration);
    (definition.unwrap(), notes)
}

pub(super) fn upstream_of(wire: Value) -> (Option<(OutboundKey, UpstreamPlan)>, Vec<String>) {
    let (definition, notes) = sidecar(json!({}), json!({ "Upstreams": [wire] }));
    (definition.upstreams.into_iter().next(), notes)
}
