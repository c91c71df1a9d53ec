#!/usr/bin/env bash
# Builds llama-cpp-python with CUDA for the card of this machine alone and runs bench/gpu.py with it, without a network.
#
#   bench/gpu.sh --pack DIR                      with a network: collects what the other machine needs, under 60 MB
#   bench/gpu.sh --from DIR [--gemma] [FLAG...]  there: builds (minutes), then `python -m bench.gpu FLAG...`
#   bench/gpu.sh --cpu [FLAG...]                 the same steps without a GPU, with the llama-cpp-python that is there
#
# --no-build: take DIR/built (a folder with the package llama_cpp, built for the card elsewhere) or what is installed.
# Where the build fails or takes more than BUILD_LIMIT_S seconds, DIR/built is taken as well, if it is there.
# PYTHON: an interpreter with torch, transformers, numpy, sentencepiece, scikit-build-core (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3} BUILD_LIMIT_S=${BUILD_LIMIT_S:-420}
WORK=${WORK:-$PWD/build/gpu} FROM="" BUILD=yes
SITE=$WORK/site

pack() { # into $1: llama-cpp-python's source without what is not compiled, and wheels that PyTorch does not bring
    mkdir -p "$1/wheels" "$WORK"
    awk '/^llama-cpp-python==/{p=1} p{print} p&&!/\\$/{exit}' requirements.lock > "$WORK/llama.txt"
    "$PYTHON" -m pip download -q --no-deps --require-hashes --no-binary llama-cpp-python \
        -r "$WORK/llama.txt" -d "$WORK"
    rm -rf "$1/llama" && mkdir "$1/llama"
    tar -xzf "$WORK"/llama_cpp_python-*.tar.gz -C "$1/llama" --strip-components=1
    strip_source "$1/llama"
    grep -oE '^(gguf|diskcache|prometheus-client)==[^ ]+' requirements.lock > "$WORK/wheels.txt"
    "$PYTHON" -m pip download -q --no-deps --only-binary=:all: -r "$WORK/wheels.txt" -d "$1/wheels"
    du -sm "$1"
}

strip_source() { # what a CPU and CUDA build of the libraries does not read
    (cd "$1" && rm -rf .git docs examples tests docker scripts
    cd vendor/llama.cpp && rm -rf app benches ci conversion docs examples gguf-py grammars media models pocs \
        requirements scripts skills tests tools common
    cd ggml/src && rm -rf ggml-blas ggml-cann ggml-et ggml-hexagon ggml-hip ggml-metal ggml-musa ggml-opencl \
        ggml-openvino ggml-rpc ggml-sycl ggml-virtgpu ggml-vulkan ggml-webgpu ggml-zdnn ggml-zendnn)
}

cublas() { # the folder of Python's own cuBLAS (nvidia-cublas), which PyTorch brings; nothing where there is none
    "$PYTHON" - <<'EOF'
import importlib.util, pathlib
found = importlib.util.find_spec("nvidia")
folders = [pathlib.Path(folder) for folder in found.submodule_search_locations] if found else []
print(next((folder / name for folder in folders for name in ("cu13", "cublas", "cu12")
            if (folder / name / "include" / "cublas_v2.h").is_file()), ""))
EOF
}

cmake_options() { # for this card alone; a toolkit without cuBLAS takes Python's, one without libcuda's stub does without
    echo "-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DGGML_CCACHE=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE=$WORK/options.cmake"
    [ "$CUDA" ] || return 0
    echo "-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCHITECTURES:-native} -DGGML_CUDA_NCCL=OFF"
    echo "-DGGML_CUDA_FA_QUANTS=f16-f16"
    ls "$CUDA"/lib64/stubs/libcuda.so > /dev/null 2>&1 || echo "-DGGML_CUDA_NO_VMM=ON"
    if [ ! -f "$CUDA/include/cublas_v2.h" ] && [ "$CUBLAS" ]; then
        echo "-DCMAKE_CUDA_FLAGS=-I$CUBLAS/include"
        for name in cublas cublasLt; do echo "-DCUDA_${name}_LIBRARY=$(ls "$CUBLAS/lib/lib$name".so.* | head -1)"; done
    fi
}

build() { # into $SITE
    echo 'set(LLAMA_BUILD_COMMON OFF)' > "$WORK/options.cmake"
    rm -rf "$WORK/wheel" && mkdir "$WORK/wheel"
    CMAKE_GENERATOR=Ninja CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) CMAKE_ARGS=$(cmake_options | xargs) \
        timeout "$BUILD_LIMIT_S" "$PYTHON" -m pip wheel -v --disable-pip-version-check --no-build-isolation --no-deps \
        --no-index -C build-dir="$WORK/cmake" -w "$WORK/wheel" "$FROM/llama" > "$WORK/build.log" 2>&1 &&
        "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target "$SITE" "$WORK"/wheel/*.whl
}

flags=()
while [ $# -gt 0 ]; do
    case $1 in
        --pack) pack "$2"; exit ;;
        --from) FROM=$(cd "$2" && pwd); shift ;;
        --no-build) BUILD="" ;;
        *) flags+=("$1") ;;
    esac
    shift
done
case " ${flags[*]} " in *" --cpu "*) CUDA="" ;; *) CUDA=${CUDA_HOME:-/usr/local/cuda} ;; esac

mkdir -p "$SITE"
CUBLAS=$(cublas)
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export LD_LIBRARY_PATH=${CUDA:+$CUDA/lib64:}${CUBLAS:+$CUBLAS/lib:}${LD_LIBRARY_PATH:-}
if ls "$FROM"/wheels/*.whl > /dev/null 2>&1; then
    "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target "$SITE" "$FROM"/wheels/*.whl
fi
if [ "$BUILD" ] && [ -d "$FROM/llama" ]; then
    started=$SECONDS
    if build; then
        export RERANK_BENCH_BUILD="built here in $((SECONDS - started)) s"
        echo "$RERANK_BENCH_BUILD"
    else
        echo "not built: $((SECONDS - started)) s, the end of $WORK/build.log:" && tail -n 15 "$WORK/build.log"
        BUILD=""
    fi
fi
if [ ! "$BUILD" ] && [ -d "$FROM/built" ]; then
    export PYTHONPATH=$FROM/built:$PYTHONPATH
    export RERANK_BENCH_BUILD="built elsewhere"
    echo "taking $FROM/built"
fi
exec "$PYTHON" -m bench.gpu "${flags[@]}"
