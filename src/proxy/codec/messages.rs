//! What is known of the HTTP messages on a connection, besides what its codec knows: requests that came, responses that
//! were given to the codec, and what was refused.

use std::io;

use super::header_block::HeaderBlockProgress;
use super::http1_validator::Http1Validator;
use super::resets::Resets;
use crate::snapshot::Upgrades;

/// Requests read from a connection and responses given to it.
#[derive(Default)]
pub(super) struct Messages {
    /// Upgrades that an HTTP/1 client may ask for.
    pub upgrades: Upgrades,
    /// Judges what an HTTP/1 client sends.
    validator: Option<Http1Validator>,
    /// Why it has refused one, until that is asked.
    refusal: Option<&'static str>,
    /// Follows what an HTTP/2 client sends.
    blocks: Option<HeaderBlockProgress>,
    /// Follows what the codec sends to an HTTP/2 client.
    resets: Option<Resets>,
    /// Responses that the codec has been given, the last of them perhaps not whole.
    pub begun: u64,
    /// Responses that the codec has been given whole.
    pub answered: u64,
    /// The codec ends and leaves the connection to another protocol.
    pub upgraded: bool,
    /// The client takes the end of the connection for the end of a body.
    pub end_is_bodys: bool,
    /// A response broke off.
    pub broke_off: bool,
}

/// The state of a client that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaits {
    Nothing,
    /// That more of a body is taken, as far as it has come.
    Taking,
    /// An answer of which nothing has been written.
    Answer,
    /// The rest of one.
    Rest,
}

const FOREIGN: &str = "the client does not speak HTTP";

impl Messages {
    /// Lets nothing but unambiguous HTTP/1 requests through from here on.
    pub(super) fn be_strict(&mut self) {
        self.validator = Some(Http1Validator::new(self.upgrades.clone()));
    }

    /// Follows HTTP/2 header blocks, which begin behind a preface of so many bytes, and the streams that the codec resets.
    pub(super) fn follow_frames(&mut self, preface: usize) {
        self.blocks = Some(HeaderBlockProgress::after(preface));
        self.resets = Some(Resets::default());
    }

    /// Looks for no more requests: what follows is of another protocol.
    pub(super) fn release(&mut self) {
        self.upgraded = false;
        self.validator = None;
    }

    /// The bytes that the codec reads instead of a refused request.
    #[must_use]
    pub(super) fn instead(&mut self) -> Option<&[u8]> {
        self.validator.as_mut().filter(|validator| validator.refused().is_some()).map(|validator| validator.rest())
    }

    /// Looks at what was read, and makes it unreadable to the codec from where a request is refused.
    ///
    /// # Errors
    /// The bytes received are not HTTP.
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        if let Some(blocks) = &mut self.blocks {
            blocks.follow(bytes);
        }
        if let Some(validator) = &mut self.validator {
            validator.validate(bytes);
            let (refused, foreign) = (validator.refused(), validator.is_foreign());
            self.refusal = refused.or(foreign.then_some(FOREIGN));
            if foreign {
                return Err(io::Error::new(io::ErrorKind::InvalidData, FOREIGN));
            }
        }
        Ok(())
    }

    /// Looks at what the codec writes.
    pub(super) fn written(&mut self, bytes: &[u8]) {
        if let Some(resets) = &mut self.resets {
            resets.follow(bytes);
        }
    }

    /// The response on this HTTP/2 stream breaks off.
    pub(super) fn breaks_off(&mut self, stream: u32) {
        if let Some(resets) = &mut self.resets {
            resets.breaks_off(stream);
        }
    }

    /// Why a request was refused, here or by an HTTP/2 codec, since this was asked last.
    pub(super) fn take_refusal(&mut self) -> Option<&'static str> {
        let resets = self.resets.as_mut().and_then(Resets::take);
        resets.or_else(|| self.refusal.take())
    }

    /// The number of the request whose head has begun to come and is not complete.
    #[must_use]
    pub(super) fn begun_head(&self) -> Option<u64> {
        let begun_block = || self.blocks.as_ref().and_then(HeaderBlockProgress::begun_head);
        self.validator.as_ref().and_then(Http1Validator::begun_head).or_else(begun_block)
    }

    /// Every HTTP/1 request that came has been answered.
    #[must_use]
    pub(super) fn are_answered(&self) -> bool {
        let requests = self
            .validator
            .as_ref()
            .filter(|validator| validator.refused().is_none())
            .and_then(Http1Validator::whole_requests);
        requests.is_some_and(|requests| requests > 0 && requests == self.answered) && !self.upgraded
    }

    /// What an HTTP/1 client waits for that has sent a request, or a part of it.
    #[must_use]
    pub(super) fn awaits(&self) -> Awaits {
        if self.validator.as_ref().is_some_and(Http1Validator::awaits_body) {
            return Awaits::Taking;
        }
        let requests = self.validator.as_ref().and_then(Http1Validator::whole_requests).filter(|_| !self.upgraded);
        match requests {
            Some(requests) if requests > self.begun => Awaits::Answer,
            Some(requests) if requests > self.answered => Awaits::Rest,
            _ => Awaits::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_of_http1_waits_for_an_answer_and_then_for_the_rest_of_it() {
        let mut messages = Messages::default();
        assert_eq!(messages.awaits(), Awaits::Nothing);
        messages.be_strict();
        messages.read(&mut b"GET / HTTP/1.1\r\nhost".to_vec()).unwrap();
        assert!(messages.begun_head().is_some() && !messages.are_answered());
        messages.read(&mut b": a\r\n\r\n".to_vec()).unwrap();
        assert_eq!((messages.begun_head(), messages.awaits()), (None, Awaits::Answer));
        messages.begun += 1;
        assert_eq!(messages.awaits(), Awaits::Rest);
        messages.answered += 1;
        assert_eq!((messages.awaits(), messages.are_answered()), (Awaits::Nothing, true));
        messages.release();
        assert!(!messages.are_answered(), "what is no HTTP any more has no requests");
    }

    #[test]
    fn a_refused_request_is_read_as_something_else_and_told_once() {
        let mut messages = Messages::default();
        messages.be_strict();
        messages
            .read(&mut b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n".to_vec())
            .unwrap();
        assert!(messages.instead().is_some());
        assert!(messages.take_refusal().is_some());
        assert!(messages.take_refusal().is_none());
    }

    #[test]
    fn what_is_no_http_is_an_error() {
        let mut messages = Messages::default();
        messages.be_strict();
        assert!(messages.read(&mut b"OPTIONS rtsp://a RTSP/1.0\r\n\r\n".to_vec()).is_err());
        assert_eq!(messages.take_refusal(), Some(FOREIGN));
    }
}
