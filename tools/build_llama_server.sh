#!/usr/bin/env bash
# Builds llama-server, the peer that `make bench` measures against, from the same source package as llama-cpp-python and
# with the same flags. About 6 minutes on 2 cores.
#   tools/build_llama_server.sh LLAMA_CPP_PYTHON_VERSION "CMAKE_ARGS" TARGET
set -euo pipefail
version=$1 cmake_args=$2 target=$3
python=${PYTHON:-python3}
work=$(dirname "$target")/source
mkdir -p "$work"
[ -d "$work/llama_cpp_python-$version" ] || {
  "$python" -m pip download -q --no-binary :all: --no-deps --no-build-isolation --dest "$work" "llama-cpp-python==$version" 2>/dev/null ||
    "$python" -m pip download -q --no-binary :all: --no-deps --dest "$work" "llama-cpp-python==$version"
  tar -xzf "$work"/llama_cpp_python-"$version".tar.gz -C "$work"
}
"$python" -m pip install -q cmake ninja
bin=$(dirname "$("$python" -c 'import sys; print(sys.executable)')")
export PATH="$bin:$PATH"
eval "cmake -S '$work/llama_cpp_python-$version/vendor/llama.cpp' -B '$work/build' -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
  -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=ON $cmake_args" >/dev/null
cmake --build "$work/build" --target llama-server
cp "$work/build/bin/llama-server" "$target"
