//! Text with operators in it.

use super::operator::{Operator, Value};
use super::record::Record;

/// Text with operators in it, read once and filled from each record.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Template(Vec<Piece>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    Literal(String),
    Operator(Operator),
    /// An operator whose value is never known here.
    Unknown(String),
}

/// The text is no template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadTemplate(&'static str);

impl Template {
    /// Reads a text. `%%` is a percent sign.
    ///
    /// # Errors
    /// When percent signs don't pair up.
    pub fn read(text: &str) -> Result<Self, BadTemplate> {
        let mut pieces = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('%') {
            literal.push_str(before);
            if let Some(after) = after.strip_prefix('%') {
                literal.push('%');
                rest = after;
                continue;
            }
            let end = operator_end(after).ok_or(BadTemplate("a percent sign has no other that ends its operator"))?;
            if !literal.is_empty() {
                pieces.push(Piece::Literal(std::mem::take(&mut literal)));
            }
            let (operator, after) = (&after[..end], &after[end + 1..]);
            let unknown = || Piece::Unknown(operator.to_owned());
            pieces.push(Operator::read(operator).map_or_else(unknown, Piece::Operator));
            rest = after;
        }
        literal.push_str(rest);
        if !literal.is_empty() || pieces.is_empty() {
            pieces.push(Piece::Literal(literal));
        }
        Ok(Self(pieces))
    }

    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.0
    }

    /// Operators whose value is never known here, without their percent signs.
    pub fn unknown(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|piece| match piece {
            Piece::Unknown(operator) => Some(operator.as_str()),
            _ => None,
        })
    }

    /// What it comes to; nothing stands in the place of what is not known.
    #[must_use]
    pub fn text(&self, record: &Record<'_>) -> String {
        let mut text = String::new();
        for piece in &self.0 {
            match piece.value(record) {
                Some(Value::Text(value)) => text.push_str(&value),
                Some(Value::Number(number)) => text.push_str(&number.to_string()),
                None => {}
            }
        }
        text
    }

    /// The text, if it has no operators.
    #[must_use]
    pub fn fixed(&self) -> Option<&str> {
        match &self.0[..] {
            [Piece::Literal(text)] => Some(text),
            _ => None,
        }
    }
}

impl Piece {
    /// What it stands for; `None` where that is not known.
    #[must_use]
    pub fn value<'a>(&'a self, record: &Record<'a>) -> Option<Value<'a>> {
        match self {
            Self::Literal(text) => Some(Value::Text(text.as_str().into())),
            Self::Operator(operator) => operator.value(record),
            Self::Unknown(_) => None,
        }
    }
}

/// Where the operator ends that `text` begins with: at the first percent sign that is in no parentheses, as
/// times have percent signs of their own.
fn operator_end(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            b'%' if depth == 0 => return Some(at),
            _ => {}
        }
    }
    None
}

impl BadTemplate {
    #[must_use]
    pub fn reason(&self) -> &'static str {
        self.0
    }
}
