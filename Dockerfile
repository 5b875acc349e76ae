# syntax=docker/dockerfile:1
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=devel
RUN CGO_ENABLED=0 go build -tags nomsgpack -trimpath -buildvcs=false -ldflags "-s -w -X main.version=${VERSION}" -o /oneo ./cmd/oneo

# A slim Debian and not an empty image: the health check needs a client, and an operator a shell.
FROM debian:12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates curl \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /oneo /usr/local/bin/oneo
# A number, so that Kubernetes can see that it is not root.
USER 65532:65532
ENV ONEO_SERVER_ADDR=:8000 ONEO_SERVER_OPS_ADDR=127.0.0.1:8001 ONEO_LOG_FORMAT=json
EXPOSE 8000
# Ready, not only alive: it reaches PostgreSQL and its schema is not behind.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD ["curl", "-fsS", "-o", "/dev/null", "http://127.0.0.1:8001/readyz"]
ENTRYPOINT ["/usr/local/bin/oneo"]
CMD ["serve"]
