//! Builds, wires, waits and drains.
