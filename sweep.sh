#!/usr/bin/env bash
# Every run of the paper. Finished ones are skipped, interrupted ones resume, failed ones are named.
#   bash sweep.sh                         the paper's 16 runs, one after another
#   bash sweep.sh --list                  every run's name and flags
#   bash sweep.sh vgg08 vgg106            some of them; the extras run only when named
#   bash sweep.sh vgg08 -- --epochs 5 --out runs-short    flags after -- go to every run
#   JOBS=4 SEEDS="0 1 2" bash sweep.sh    four at once, three seeds of each
#   sbatch --gres=gpu:1 --array=1-16 sweep.sh    SLURM, a line of the list each (17 on: the extras)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # it was started with sh
set -u

RUNS='vgg08                --blocks 0
vgg38
vgg38_bn             --bn
vgg38_rn             --bn --residual
vgg38_rn_sigmoid     --bn --residual --act sigmoid
vgg38_rn_wd1e-2      --bn --residual --wd 1e-2
vgg38_rn_wd1e-3      --bn --residual --wd 1e-3
vgg38_rn_wd1e-4      --bn --residual --wd 1e-4
vgg38_rn_lr5         --bn --residual --wd 1e-3 --lr-scale 5
vgg38_rn_lr30        --bn --residual --wd 1e-3 --lr-scale 30
vgg38_rn_lr100       --bn --residual --wd 1e-3 --lr-scale 100
vgg38_rn_batch256    --bn --residual --wd 1e-3 --batch-size 256
vgg38_rn_batch512    --bn --residual --wd 1e-3 --batch-size 512
vgg68                --bn --residual --wd 1e-3 --blocks 10
vgg72                --bn --residual --wd 1e-3 --stages 5 --blocks 6
vgg132               --bn --residual --wd 1e-3 --stages 5 --blocks 12'  # the paper calls it VGG106

# Not in the paper: a net that does have 106 layers, its author's batch 64, residual without BN,
# plain VGG38 with other initial weights, and cw21_*: the table that the coursework has handed out
# since 2021 (README).
EXTRAS='vgg106               --bn --residual --wd 1e-3 --stages 4 --blocks 12
vgg38_rn_batch64     --bn --residual --wd 1e-3 --batch-size 64
vgg38_residual_only  --residual
vgg38_he             --init he
vgg38_dirac          --init dirac
cw21_vgg08           --cosine batches --blocks 0
cw21_vgg38_bn        --cosine batches --bn
cw21_vgg38_rc        --cosine batches --plain-reduction --residual
cw21_vgg38_bn_rc     --cosine batches --plain-reduction --bn --residual
cw21_vgg38_bn_lr1e-2      --cosine batches --bn --lr 1e-2
cw21_vgg38_bn_rc_lr1e-2   --cosine batches --plain-reduction --bn --residual --lr 1e-2'

list() { printf '%s\n' "$RUNS" "$EXTRAS"; }
fail() { echo "sweep.sh: $1" >&2; exit 2; }

if [ "${1:-}" = --list ]; then list; exit; fi
if [ "${1:-}" = --help ]; then sed -n '2,/^set/s/^# //p' "$0"; exit; fi
chosen=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  line=$(list | awk -v name="$1" '$1 == name')
  [ -n "$line" ] || fail "no run is called $1 (see --list); flags for train.py go after --"
  chosen="$chosen$line"$'\n'
  shift
done
[ $# -eq 0 ] || shift  # the --
runs=${chosen:-$RUNS}
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  runs=$(echo "${chosen:-$(list)}" | sed -n "${SLURM_ARRAY_TASK_ID}p")
  [ -n "$runs" ] || fail "the list has no line $SLURM_ARRAY_TASK_ID (see --list)"
fi
JOBS=${JOBS:-1}
SEEDS=${SEEDS:-0}
[[ $JOBS =~ ^[1-9][0-9]*$ ]] || fail "JOBS is how many runs at once, not $JOBS"
[[ " $SEEDS" =~ ^(\ +(0|[1-9][0-9]*))+$ ]] || fail "SEEDS is a list of whole numbers, not '$SEEDS'"
command -v python >/dev/null || fail "there is no python: activate the virtual environment"
train=$(dirname "$0")/train.py
[ -e "$train" ] || train=train.py  # SLURM runs a copy of this file, in sbatch's folder
if [ "$JOBS" -gt 1 ]; then  # each gets its share of the cores
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > JOBS ? cores / JOBS : 1))}
  export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-$OMP_NUM_THREADS}
fi

pids=()
names=()
trap 'kill $(jobs -rp) 2>/dev/null; wait; exit 130' HUP INT TERM
for seed in $SEEDS; do
  while read -r name flags; do
    [ -n "$name" ] || continue
    [ "$seed" -eq 0 ] || name=$name-seed$seed
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do sleep 0.2; done
    python "$train" --name "$name" --seed "$seed" $flags "$@" </dev/null &
    pids+=($!)
    names+=("$name")
  done <<<"$runs"
done
failed=
for i in "${!pids[@]}"; do wait "${pids[i]}" || failed="$failed ${names[i]}"; done
[ -z "$failed" ] || { echo "sweep.sh: failed:$failed" >&2; exit 1; }
echo "sweep.sh: all done"
