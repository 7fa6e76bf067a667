# Two images: the sidecar (the default) and, with --target app, the demo's apps.
ARG PYTHON_IMAGE=python:3-slim-bookworm
ARG RUST_IMAGE=rust:1-slim-bookworm
ARG RUNTIME_IMAGE=debian:bookworm-slim

FROM ${PYTHON_IMAGE} AS app
COPY scripts/demo-requirements.txt scripts/demo_app.py /app/
RUN python3 -m pip install --no-cache-dir --root-user-action=ignore -r /app/demo-requirements.txt
USER 65534:65534
ENTRYPOINT ["python3", "-u", "/app/demo_app.py"]

FROM ${RUST_IMAGE} AS build
WORKDIR /lictor
COPY Cargo.toml Cargo.lock build.rs ./
COPY .cargo .cargo
COPY vendor vendor
COPY scripts/link-order.ld scripts/
COPY src src
RUN cargo build --release --locked

FROM ${RUNTIME_IMAGE} AS lictor
COPY --from=build /lictor/target/release/lictor /usr/local/bin/lictor
USER 65534:65534
ENTRYPOINT ["lictor"]
