//! The configuration in Envoy's shapes: `/config_dump`, `/clusters` and `/listeners`.
//!
//! The shapes are those of Envoy 1.40 under Consul 1.19.2, as `consul troubleshoot`, `consul-k8s proxy read` and Consul's
//! own tests read them: protobuf messages in their JSON form. Here they are only written: what is configured is the
//! snapshot.

mod clusters;
mod config_dump;
mod listeners;
mod names;
mod rbac;
mod routes;

pub(super) use self::clusters::page as clusters;
pub(super) use self::config_dump::page as config_dump;
pub(super) use self::listeners::page as listeners;
