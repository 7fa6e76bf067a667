//! Logs in Consul's layout.

#[derive(Debug, Clone)]
pub struct Settings {
    pub level: tracing::Level,
    pub json: bool,
}
