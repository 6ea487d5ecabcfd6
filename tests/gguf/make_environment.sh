#!/bin/sh
# Builds the environment that the tests of GGUF files run real llama.cpp in:   sh make_environment.sh DIR
# Does nothing when DIR was built from the same list before. PYTHON names the interpreter to build with (python3 by default).
set -eu

if [ "$#" -ne 1 ]; then
    echo "usage: make_environment.sh DIR" >&2
    exit 2
fi
dir=$1
here=$(dirname "$0")
list="llama-cpp-py-sync==0.11739 xllamacpp==2026.10.11549"
stamp="$dir/quant-llama-environment"

if [ -x "$dir/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$list" ]; then
    echo "$dir: up to date" >&2
    exit 0
fi
rm -f "$stamp"
"${PYTHON:-python3}" -m venv --clear "$dir"
"$dir/bin/python" -m pip install --quiet $list
package=$("$dir/bin/python" -c 'import importlib.util as u; print(u.find_spec("llama_cpp_py_sync").submodule_search_locations[0])')
load='from llama_cpp_py_sync._cffi_bindings import get_lib; get_lib()'
"$dir/bin/python" -c "$load" 2>/dev/null || "$dir/bin/python" "$here/older_libc.py" "$package"
"$dir/bin/python" -c "$load"
printf '%s\n' "$list" >"$stamp"
echo "$dir: ready" >&2
