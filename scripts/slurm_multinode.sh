#!/bin/bash
#SBATCH --job-name=wan22
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=wan22-%j.log
#
# A batch on all GPUs of several nodes, in one job: a Ray cluster for as long as the job lasts.
#
#   sbatch --nodes=4 scripts/slurm_multinode.sh prompts.txt --output /shared/videos [OPTIONS OF wan22 batch …]
#
# Needs wan22[ray] on every node, and weights and videos on a file system that all share. A lost node's videos are made on
# the others. Three minutes before its time is over the job keeps the state of all and asks to be queued again. Where a
# queue gives single GPUs sooner than whole nodes, slurm_array.sh does the same without Ray. RAY_HOST: this node's address,
# where the first of `hostname -I` is not on the cluster's network.
set -u

if [ $# -eq 0 ]; then
    echo "usage: sbatch [--nodes=4] $0 FILE [OPTIONS OF wan22 batch …]" >&2
    exit 2
fi

read -r -a command <<<"${WAN22:-wan22}"
nodes=${SLURM_JOB_NUM_NODES:?not inside a SLURM job}
host=${RAY_HOST:-$(hostname -I | cut -d ' ' -f 1)}
port=$((20000 + SLURM_JOB_ID % 20000)) # jobs may share a node
address=$host:$port
node=(--num-cpus="${SLURM_CPUS_ON_NODE:-1}" --object-store-memory=100000000 --disable-usage-stats --block)

pids=()
# shellcheck disable=SC2329  # called by the trap
cleanup() {
    [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null
    wait
}
trap cleanup EXIT

ray start --head --node-ip-address="$host" --port="$port" --include-dashboard=false "${node[@]}" >&2 &
pids+=($!)
if [ "$nodes" -gt 1 ]; then
    srun --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --exclude="${SLURMD_NODENAME:-$(hostname -s)}" \
        ray start --address="$address" "${node[@]}" >&2 &
    pids+=($!)
fi

# Workers are counted when the batch begins: all nodes should be there by then, and it goes on with those that are.
python - "$address" "$nodes" "${RAY_WAIT:-300}" <<'PYTHON' || exit 1
import sys, time
import ray
address, nodes, patience = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
end = time.monotonic() + patience
there = 0
while there < nodes and time.monotonic() < end:
    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        there = sum(node["Alive"] for node in ray.nodes())
    except Exception as error:
        print(f"waiting for Ray: {str(error).splitlines()[0]}", file=sys.stderr)
    time.sleep(1)
print(f"{there} of {nodes} nodes", file=sys.stderr)
sys.exit(there == 0)
PYTHON

"${command[@]}" batch --engine ray --ray-address "$address" "$@" &
child=$!
asked=
trap 'asked=1; kill -TERM "$child" 2>/dev/null' TERM INT

code=0
wait "$child" || code=$?
if [ -n "$asked" ]; then
    # The first wait ended with the signal, not with the child, which has all workers keep their state.
    code=0
    wait "$child" || code=$?
    [ "$code" -eq 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
