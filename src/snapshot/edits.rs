//! Changes to the headers of requests and responses.

use std::fmt;

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::operators::{self, Record, Template};

/// Changes to headers: those of one config entry after those of another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Edits(Vec<EntryEdits>);

/// The changes of one config entry, of which no value depends on another.
#[derive(Debug, Clone, PartialEq, Eq)]
struct EntryEdits {
    remove: Vec<HeaderName>,
    add: Vec<(HeaderName, EditValue)>,
    set: Vec<(HeaderName, EditValue)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum EditValue {
    Fixed(HeaderValue),
    /// With operators.
    Template(Template),
}

impl Edits {
    pub(super) const NONE: &'static Self = &Self(Vec::new());

    /// Reads one entry's changes, which Envoy makes in this order. `%…%` in values are Envoy's operators.
    ///
    /// # Errors
    /// Names a header that can't be edited, as it frames the message or is no header, or a value that can't be sent
    /// or has an operator that Envoy does not know.
    pub fn new<'a>(
        remove: impl IntoIterator<Item = &'a str>,
        add: impl IntoIterator<Item = (&'a str, &'a str)>,
        set: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, BadEdit> {
        let valued = |(name, text)| Ok((editable(name)?, value(name, text)?));
        // A value of nothing is not sent.
        let sent = |edit: &Result<(HeaderName, EditValue), BadEdit>| !matches!(edit, Ok((_, EditValue::Fixed(value))) if value.is_empty());
        let edits = EntryEdits {
            remove: remove.into_iter().map(editable).collect::<Result<_, _>>()?,
            add: add.into_iter().map(valued).filter(sent).collect::<Result<_, _>>()?,
            set: set.into_iter().map(valued).filter(sent).collect::<Result<_, _>>()?,
        };
        Ok(if edits.is_empty() { Self::default() } else { Self(vec![edits]) })
    }

    /// These changes, then those.
    #[must_use]
    pub fn then(mut self, next: &Self) -> Self {
        self.0.extend_from_slice(&next.0);
        self
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Operators in values that are never known here, so that nothing stands in their place.
    pub fn unknown_operators(&self) -> impl Iterator<Item = &str> {
        self.templates().flat_map(Template::unknown)
    }

    /// Whether values depend on the exchange.
    #[must_use]
    pub fn have_operators(&self) -> bool {
        self.templates().next().is_some()
    }

    fn templates(&self) -> impl Iterator<Item = &Template> {
        let values = self.0.iter().flat_map(|edits| edits.add.iter().chain(&edits.set));
        values.filter_map(|(_, value)| value.template())
    }

    /// Makes the changes to the headers of a request. `known` is what operators stand for, but for those headers.
    pub fn apply_to_request(&self, headers: &mut HeaderMap, known: &Record<'_>) {
        for edits in &self.0 {
            edits.apply(headers, |template, headers| {
                let mut record = known.clone();
                if let Some(request) = &mut record.request {
                    request.headers = headers;
                }
                template.text(&record)
            });
        }
    }

    /// The same for a response.
    pub fn apply_to_response(&self, headers: &mut HeaderMap, known: &Record<'_>) {
        for edits in &self.0 {
            edits.apply(headers, |template, headers| {
                let mut record = known.clone();
                if let Some(response) = &mut record.response {
                    response.headers = headers;
                }
                template.text(&record)
            });
        }
    }
}

impl EntryEdits {
    fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty() && self.set.is_empty()
    }

    /// What is removed is not there any more when values are made; and no value sees another (Envoy 1.40). One that comes
    /// to nothing is left out, and leaves what was there.
    fn apply(&self, headers: &mut HeaderMap, fill: impl Fn(&Template, &HeaderMap) -> String) {
        for name in &self.remove {
            headers.remove(name);
        }
        let templates = self.add.iter().chain(&self.set).filter_map(|(_, value)| value.template());
        let made: Vec<Option<HeaderValue>> = templates
            .map(|template| HeaderValue::from_bytes(fill(template, headers).as_bytes()).ok())
            .map(|value| value.filter(|value| !value.is_empty()))
            .collect();
        let mut made = made.into_iter();
        let mut value = |value: &EditValue| match value {
            EditValue::Fixed(value) => Some(value.clone()),
            EditValue::Template(_) => made.next().flatten(),
        };
        for (name, edit) in &self.add {
            value(edit).map(|value| headers.append(name, value));
        }
        for (name, edit) in &self.set {
            value(edit).map(|value| headers.insert(name, value));
        }
    }
}

impl EditValue {
    fn template(&self) -> Option<&Template> {
        match self {
            Self::Template(template) => Some(template),
            Self::Fixed(_) => None,
        }
    }
}

/// A header edit that can't be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadEdit(String);

fn editable(name: &str) -> Result<HeaderName, BadEdit> {
    let framing = [CONNECTION, CONTENT_LENGTH, HOST, TE, TRANSFER_ENCODING, UPGRADE];
    HeaderName::from_bytes(name.as_bytes())
        .ok()
        .filter(|name| !framing.contains(name))
        .ok_or_else(|| BadEdit(format!("the header {name:?} can't be edited")))
}

fn value(name: &str, text: &str) -> Result<EditValue, BadEdit> {
    let bad = |why: &dyn fmt::Display| BadEdit(format!("the value of the header {name:?} can't be sent: {why}"));
    let template = Template::read(text).map_err(|error| bad(&error))?;
    if let Some(operator) = template.unknown().find(|operator| !operators::is_known_to_envoy(operator)) {
        return Err(bad(&format_args!("there is no operator %{operator}%")));
    }
    match template.fixed() {
        Some(text) => HeaderValue::try_from(text).map(EditValue::Fixed).map_err(|error| bad(&error)),
        None if HeaderValue::try_from(text).is_err() => Err(bad(&"it has characters that no header has")),
        None => Ok(EditValue::Template(template)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::operators::Request;
    use crate::snapshot::fixture::headers;

    fn apply(edits: &Edits, headers: &mut HeaderMap) {
        edits.apply_to_request(headers, &Record::new(SystemTime::UNIX_EPOCH));
    }

    #[test]
    fn edits_remove_then_add_then_set() {
        let edits = Edits::new(["x-a", "X-B"], [("x-a", "1"), ("x-c", "50%%")], [("x-c", "2"), ("x-d", "3")]).unwrap();
        let mut map = headers(&[("x-a", "0"), ("x-a", "00"), ("x-b", "0"), ("x-c", "0"), ("x-e", "0")]);
        apply(&edits, &mut map);
        assert_eq!(map, headers(&[("x-a", "1"), ("x-c", "2"), ("x-d", "3"), ("x-e", "0")]));
        let mut map = HeaderMap::new();
        apply(&Edits::new([], [("x-c", "50%%")], []).unwrap().then(&Edits::new(["x-a"], [], []).unwrap()), &mut map);
        assert_eq!(map, headers(&[("x-c", "50%")]));
        for (name, value) in [("content-length", "1"), (":path", "/"), ("a b", ""), ("Host", "x"), ("x", "a\nb")] {
            assert!(Edits::new([], [(name, value)], []).is_err(), "{name}");
        }
    }

    /// As Envoy 1.40 does with them.
    #[test]
    fn operators_in_values_of_edits() {
        let found = headers(&[("x-in", "in"), ("x-two", "1"), ("x-two", "2"), ("x-old", "old")]);
        let edited = |remove: &[&str], set: &[(&str, &str)]| {
            let edits = Edits::new(remove.iter().copied(), [], set.iter().copied()).unwrap();
            let mut map = found.clone();
            let (protocol, headers) = ("HTTP/1.1", &HeaderMap::new());
            let request = Request { protocol, method: "GET", path: "/a?b=c", authority: "db.local", headers };
            edits.apply_to_request(&mut map, &Record { request: Some(request), ..Record::new(SystemTime::UNIX_EPOCH) });
            map
        };
        for (value, expected) in [
            ("%PROTOCOL%", Some("HTTP/1.1")),
            ("%REQ(x-in)%", Some("in")),
            ("%REQ(X-None?x-in):1%", Some("i")),
            ("%REQ(x-two)%", Some("1")),
            ("%REQ(:PATH)%", Some("/a?b=c")),
            ("%REQ(:METHOD)% %REQ(:AUTHORITY)%", Some("GET db.local")),
            ("a%REQ(x-none)%b", Some("ab")),
            ("%REQ(x-none)%", None),
            ("", None),
            ("%HOSTNAME%", None),
            ("%%%PROTOCOL%%%", Some("%HTTP/1.1%")),
        ] {
            let expected: Vec<_> = expected.into_iter().collect();
            let map = edited(&[], &[("x-new", value)]);
            assert_eq!(map.get_all("x-new").iter().collect::<Vec<_>>(), expected, "{value}");
        }
        // What has no value leaves what was there; no value sees another; what is removed is not seen.
        let map = edited(&[], &[("x-old", "%REQ(x-none)%"), ("x-in", "new"), ("x-copy", "%REQ(x-in)%")]);
        assert_eq!(
            (&map["x-old"], &map["x-in"], &map["x-copy"]),
            (&"old".parse().unwrap(), &"new".parse().unwrap(), &"in".parse().unwrap())
        );
        assert!(!edited(&["x-in"], &[("x-copy", "%REQ(x-in)%")]).contains_key("x-copy"));
        let unknown = Edits::new([], [("x", "%HOSTNAME%%PROTOCOL%")], []).unwrap();
        assert_eq!(unknown.unknown_operators().collect::<Vec<_>>(), ["HOSTNAME"]);
        for refused in [
            "%",
            "50% off",
            "%UNKNOWN%",
            "%REQ(x",
            "%protocol%",
            "% PROTOCOL %",
            "%%%",
            "%REQ(a b)%",
            "%REQ%",
            "%REQ()%",
        ] {
            assert!(Edits::new([], [("x", refused)], []).is_err(), "{refused}");
        }
    }
}
