# docker buildx build . -t rerank-server:latest                   x86-64 or arm64, for any CPU
# docker buildx build . -t rerank-server:cuda --target cuda       with llama.cpp's CUDA kernels
#
# BASE is any Debian (13 or newer on arm64, for its compiler); CUDA_BUILD and CUDA_RUN are Ubuntus with CUDA.
ARG BASE=debian:trixie-slim
ARG CUDA_BUILD=nvidia/cuda:12.8.1-devel-ubuntu24.04
ARG CUDA_RUN=nvidia/cuda:12.8.1-runtime-ubuntu24.04

FROM ${BASE} AS build
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
    ca-certificates g++ make python3-venv
WORKDIR /src
COPY Makefile requirements.lock ./
# The compiled wheel stays in the cache mount: it is compiled once for a version of llama-cpp-python.
RUN --mount=type=cache,target=/root/.cache/rerank-server make install PORTABLE=1
COPY accel accel
RUN --mount=type=cache,target=/root/.cache/rerank-server make accel PORTABLE=1
COPY convert convert
COPY rerank_server.py ./
RUN .venv/bin/python -m convert mini
COPY container container
COPY requirements-server.lock ./
COPY web web
RUN container/assemble /image

# Python, the libraries that are linked, the server and mini: no shell, no compiler, no package manager.
FROM scratch AS server
COPY --from=build /image /
ENV RERANK_HOST=0.0.0.0 RERANK_MODELS=/models:/app/models \
    PYTHONPATH=/app/packages PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 LANG=C.UTF-8
WORKDIR /app
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python3", "/app/healthcheck.py"]
ENTRYPOINT ["python3", "/app/rerank_server.py"]

FROM ${CUDA_BUILD} AS cuda-build
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
    ca-certificates g++ make python3-venv
WORKDIR /src
COPY Makefile requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/rerank-server make install PORTABLE=1 CMAKE_ARGS=-DGGML_CUDA=ON
COPY accel accel
RUN --mount=type=cache,target=/root/.cache/rerank-server make accel PORTABLE=1 CMAKE_ARGS=-DGGML_CUDA=ON
COPY convert convert
COPY rerank_server.py ./
RUN .venv/bin/python -m convert mini
COPY container container
COPY requirements-server.lock ./
COPY web web
RUN container/assemble /image --app-only

FROM ${CUDA_RUN} AS cuda
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends python3 libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=cuda-build /image /
ENV RERANK_HOST=0.0.0.0 RERANK_MODELS=/models:/app/models RERANK_GPU_LAYERS=-1 \
    PYTHONPATH=/app/packages PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 LANG=C.UTF-8
WORKDIR /app
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python3", "/app/healthcheck.py"]
ENTRYPOINT ["python3", "/app/rerank_server.py"]

# What is built without --target.
FROM server
