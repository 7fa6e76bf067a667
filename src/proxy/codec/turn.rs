//! One turn of a codec: what it writes in it is sent at its end.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use pin_project_lite::pin_project;

use super::wire::Wire;

pin_project! {
    /// A codec's connection with its wire: what the codec writes in one turn is sent at the end of it.
    pub struct Turn<C> {
        #[pin]
        connection: C,
        wire: Wire,
    }
}

impl<C> Turn<C> {
    pub(crate) fn new(connection: C, wire: Wire) -> Self {
        Self { connection, wire }
    }

    pub(crate) fn connection(self: Pin<&mut Self>) -> Pin<&mut C> {
        self.project().connection
    }
}

impl<C: Future> Future for Turn<C> {
    type Output = C::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let polled = this.connection.poll(cx);
        this.wire.end_turn(cx);
        polled
    }
}
