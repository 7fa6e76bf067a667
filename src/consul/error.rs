//! Errors between us and the agent, by kind as far as code acts on it.

use std::fmt;

use bytes::Bytes;

/// Longest part of an agent's error text that is shown, in characters.
const SHOWN_TEXT: usize = 300;

const HUNG_UP: &str = "it closed the connection without a word, as it does when stopping, or when this host has more \
                       connections than limits.http_max_conns_per_client allows";

const TURNED_AWAY: &str = "it refused the connection, as it does when this host has more than \
                           limits.http_max_conns_per_client allows";

/// A request to the agent that brought no answer. It names the request, never a token.
#[derive(Debug, Clone)]
pub struct Error {
    /// Method and path.
    pub(super) request: String,
    pub(super) address: String,
    /// The rights that the request needs.
    pub(super) needs: String,
    pub(super) kind: ErrorKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ErrorKind {
    /// No connection could be made.
    Unreachable(String),
    /// There was a connection, but no whole answer came over it in time.
    Transport(String),
    /// The agent answered with something else than success.
    Status { code: u16, text: String },
    /// The agent answered with success and a body that cannot be used.
    Decode(String),
    /// Nothing was asked: this name is a step between folders in the path of any URL, however it is escaped, and the agent
    /// redirects to another path (RFC 3986, 5.2.4; Consul 1.8.7 to 1.22).
    Name(String),
}

impl Error {
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }

    /// Nothing takes connections at the agent's address.
    pub fn is_unreachable(&self) -> bool {
        matches!(self.kind, ErrorKind::Unreachable(_))
    }

    /// No whole answer came, whether or not there was a connection.
    pub fn is_transport(&self) -> bool {
        matches!(self.kind, ErrorKind::Unreachable(_) | ErrorKind::Transport(_))
    }

    /// The rights that the request needs; empty where it needs none.
    pub fn needs(&self) -> &str {
        &self.needs
    }

    pub fn is_forbidden(&self) -> bool {
        self.code() == Some(403)
    }

    /// The agent does not know the token, or not yet.
    pub fn is_unknown_token(&self) -> bool {
        matches!(&self.kind, ErrorKind::Status { code: 403, text } if text.contains("ACL not found"))
    }

    pub fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }

    /// The agent or its servers ask to come back later. A limit on certificates that was hit on a server
    /// comes through a client agent as a 500 with the text wrapped, so the text counts as well.
    pub fn is_rate_limited(&self) -> bool {
        match &self.kind {
            ErrorKind::Status { code: 429 | 503, .. } => true,
            ErrorKind::Status { text, .. } => text.contains("Rate limit reached"),
            _ => false,
        }
    }

    /// The agent has no connection left for this host.
    pub(super) fn is_connection_limit(&self) -> bool {
        match &self.kind {
            // From 1.9 on it says so, at times before it was asked anything; before, it just hangs up.
            ErrorKind::Status { code: 429, text } => text.contains("concurrent connections"),
            ErrorKind::Transport(cause) => cause == HUNG_UP || cause == TURNED_AWAY,
            _ => false,
        }
    }

    fn code(&self) -> Option<u16> {
        match self.kind {
            ErrorKind::Status { code, .. } => Some(code),
            _ => None,
        }
    }

    /// Errors of one class have one cause as far as is known, and are logged once.
    pub(super) fn class(&self) -> String {
        match &self.kind {
            ErrorKind::Unreachable(cause) => format!("unreachable {cause}"),
            ErrorKind::Transport(cause) => format!("transport {cause}"),
            ErrorKind::Status { .. } if self.is_unknown_token() => "token".into(),
            // Rights and existence are matters of the thing that was asked for.
            ErrorKind::Status { code: code @ (403 | 404), .. } => format!("{code} {}", self.request),
            ErrorKind::Status { code, text } => format!("{code} {}", text.chars().take(80).collect::<String>()),
            ErrorKind::Decode(_) => format!("decode {}", self.request),
            ErrorKind::Name(name) => format!("name {name}"),
        }
    }

    fn remedy(&self) -> Option<String> {
        match &self.kind {
            ErrorKind::Transport(cause) if cause.contains("invalid peer certificate") => Some(
                "-ca-file or CONSUL_CACERT says which CA to trust, -tls-server-name or CONSUL_TLS_SERVER_NAME which \
                 name to expect"
                    .into(),
            ),
            ErrorKind::Transport(cause) if cause.contains("fatal alert") && cause.contains("Certificate") => Some(
                "the agent may want a client certificate (-client-cert and -client-key, or CONSUL_CLIENT_CERT and \
                 CONSUL_CLIENT_KEY)"
                    .into(),
            ),
            ErrorKind::Unreachable(_) => {
                Some("is a Consul agent running there? (-http-addr or CONSUL_HTTP_ADDR says where)".into())
            }
            ErrorKind::Status { .. } if self.is_unknown_token() => {
                Some("the agent does not know the token (-token, -token-file or CONSUL_HTTP_TOKEN)".into())
            }
            // Newer agents say it themselves.
            ErrorKind::Status { code: 403, text } if !self.needs.is_empty() && !text.contains("lacks permission") => {
                Some(format!("the token needs {}", self.needs))
            }
            ErrorKind::Status { code: 400, text } if text.contains("HTTP request to an HTTPS server") => {
                Some("the agent speaks HTTPS there: use https:// in the address, or CONSUL_HTTP_SSL=true".into())
            }
            ErrorKind::Status { code: 429, text } if text.contains("concurrent connections") => {
                Some("raise limits.http_max_conns_per_client of the agent, or use a unix socket".into())
            }
            ErrorKind::Status { text, .. } if text.contains("Connect must be enabled") => {
                Some("enable connect in the agent's and the servers' configuration".into())
            }
            ErrorKind::Name(_) => Some("give it another name".into()),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { request, address, .. } = self;
        match &self.kind {
            ErrorKind::Unreachable(cause) => write!(f, "cannot reach the agent at {address} for {request}: {cause}")?,
            ErrorKind::Transport(cause) => write!(f, "no answer from the agent at {address} to {request}: {cause}")?,
            ErrorKind::Status { code, text } if text.is_empty() => {
                write!(f, "the agent at {address} answered {request} with {code}")?;
            }
            ErrorKind::Status { code, text } => {
                write!(f, "the agent at {address} answered {request} with {code}: {text}")?;
            }
            ErrorKind::Decode(cause) => {
                write!(f, "the agent at {address} answered {request} with something unreadable: {cause}")?;
            }
            ErrorKind::Name(name) => write!(
                f,
                "the agent at {address} cannot be asked ({request}): it takes {name:?} in a path for a step between folders"
            )?,
        }
        match self.remedy() {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

impl From<reqwest::Error> for ErrorKind {
    fn from(error: reqwest::Error) -> Self {
        let error = error.without_url();
        let text = cause(&error);
        // A failed handshake is a failed connection, but somebody is there.
        if error.is_connect() && !is_tls(&error) { Self::Unreachable(text) } else { Self::Transport(text) }
    }
}

/// The deepest cause, which is the one that says what happened.
fn cause(error: &reqwest::Error) -> String {
    let mut deepest: &(dyn std::error::Error + 'static) = error;
    while let Some(source) = deepest.source() {
        if is_hang_up(source) {
            return HUNG_UP.into();
        }
        deepest = source;
    }
    match deepest.to_string() {
        // Newer agents refuse a connection with an answer to nothing.
        text if text.contains("unexpected message") => TURNED_AWAY.into(),
        text => text,
    }
}

/// The other end closed the connection. Whether we read its end, or a write or the read after it fails first, is chance.
fn is_hang_up(error: &(dyn std::error::Error + 'static)) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected};
    error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_incomplete_message)
        || error.downcast_ref::<std::io::Error>().is_some_and(|error| {
            matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected)
        })
}

fn is_tls(error: &reqwest::Error) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if error.is::<rustls::Error>() {
            return true;
        }
        next = match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            // What an IO error was made of is not its source.
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    false
}

/// An error body as one line that is fit for a log.
pub(super) fn status(code: u16, body: &Bytes) -> ErrorKind {
    let text = String::from_utf8_lossy(&body[..body.len().min(4 * SHOWN_TEXT)]);
    let text = text.trim().chars().take(SHOWN_TEXT).map(|c| if c.is_control() { ' ' } else { c }).collect();
    ErrorKind::Status { code, text }
}
