"""The container's HEALTHCHECK: status 0 when GET /ready answers 200. Port and TLS are those of the environment."""

from __future__ import annotations

import os
import ssl
import sys
import urllib.request

scheme = "https" if os.environ.get("RERANK_TLS_CERT") else "http"
url = f"{scheme}://127.0.0.1:{os.environ.get('RERANK_PORT') or 8000}/ready"
unverified = ssl._create_unverified_context()  # the certificate is for the outer name
try:
    urllib.request.urlopen(url, timeout=4, context=unverified if scheme == "https" else None).close()
except OSError as error:
    sys.exit(f"{url}: {error}")
