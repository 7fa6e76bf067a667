//! The only writer of snapshots.
