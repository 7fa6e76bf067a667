//! Traces: what callers say of theirs, our spans, and how those are sent to a collector.
//!
//! The headers are those of W3C (`traceparent`) and B3 ([`context`](self), pure). A [`Tracer`] decides about each request
//! that comes, and takes a [`Span`] when it is over. Spans wait in a bounded queue for a task that is none of the data path's;
//! it encodes them ([`otlp`](self), [`zipkin`](self)) and sends them. What the queue or the collector does not take is
//! dropped and counted. Without a tracer no header is read or made.

mod active;
mod b3;
mod client;
mod context;
mod environment;
mod exporter;
mod fields;
mod otlp;
mod sampler;
mod settings;
mod span;
mod traced;
mod tracer;
mod w3c;
mod zipkin;

pub use environment::Environment;
pub use sampler::Sampler;
pub use settings::{Collector, Headers, Otlp, Settings, Zipkin};
pub use span::{Kind, Span, Tags};
pub use traced::Traced;
pub use tracer::Tracer;
