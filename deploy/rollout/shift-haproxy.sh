#!/bin/sh
# shift-haproxy.sh PERCENT: so much of new requests goes to the new version; running streams stay where they are.
set -eu
python3 - "${HAPROXY_SOCKET:-/run/haproxy.sock}" "$1" <<'PY'
import socket, sys

path, percent = sys.argv[1], int(sys.argv[2])
for name, weight in (("new", percent), ("old", 100 - percent)):
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        link.sendall(f"set server rvllm/{name} weight {weight}\n".encode())
        said = link.recv(4096).decode().strip()
    if said:
        sys.exit(f"haproxy: {said}")
PY
