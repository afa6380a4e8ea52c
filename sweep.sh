#!/usr/bin/env bash
# Every run of the paper. Finished ones are skipped, interrupted ones resume.
#   bash sweep.sh                         the paper's 16 runs, one after another
#   bash sweep.sh --list                  every run's name and flags
#   bash sweep.sh vgg08 vgg106            some of them; the extras run only when named
#   bash sweep.sh vgg08 -- --epochs 5 --out runs-short    flags after -- go to every run
#   JOBS=4 SEEDS="0 1 2" bash sweep.sh    four at once, three seeds of each
#   sbatch --gres=gpu:1 --array=1-16 sweep.sh    SLURM, a line of the list each (17 on: the extras)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # it was started with sh
set -eu

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
# plain VGG38 with other initial weights or a smaller eps in Adam, and cw21_*: the table that the
# coursework has handed out since 2021 (README).
EXTRAS='vgg106               --bn --residual --wd 1e-3 --stages 4 --blocks 12
vgg38_rn_batch64     --bn --residual --wd 1e-3 --batch-size 64
vgg38_residual_only  --residual
vgg38_he             --init he --lr 1e-4
vgg38_dirac          --init dirac
vgg38_eps            --eps 1e-17
cw21_vgg08           --cosine batches --blocks 0
cw21_vgg38_bn        --cosine batches --bn
cw21_vgg38_rc        --cosine batches --plain-reduction --residual
cw21_vgg38_bn_rc     --cosine batches --plain-reduction --bn --residual
cw21_vgg38_bn_lr1e-2      --cosine batches --bn --lr 1e-2
cw21_vgg38_bn_rc_lr1e-2   --cosine batches --plain-reduction --bn --residual --lr 1e-2'

list() { printf '%s\n' "$RUNS" "$EXTRAS" | grep -v '^ *#'; }
fail() { echo "sweep.sh: $1" >&2; exit 2; }

if [ "${1:-}" = --list ]; then list; exit; fi
chosen=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  line=$(list | awk -v name="$1" '$1 == name')
  [ -n "$line" ] || fail "no run is called $1 (see --list); flags for train.py go after --"
  chosen=$chosen$line$'\n'
  shift
done
[ $# -eq 0 ] || shift  # the --
runs=${chosen:-$(grep -v '^ *#' <<<"$RUNS")}
task=${SLURM_ARRAY_TASK_ID:-}
[ -z "$task" ] || runs=$(echo "${chosen:-$(list)}" | sed -n "${task}p")
train=$(dirname "$0")/train.py
[ -e "$train" ] || train=train.py  # SLURM runs a copy of this file, in sbatch's folder
# These two make glibc keep a step's memory for the next one, which is faster on a CPU.
export MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_MAX_=0
JOBS=${JOBS:-1}
if [ "$JOBS" -gt 1 ]; then  # each gets its share of the cores
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > JOBS ? cores / JOBS : 1))}
  export TORCHINDUCTOR_COMPILE_THREADS=$OMP_NUM_THREADS
fi

# A line of `runs` and a seed make one run. The quotes are for xargs.
more=$([ $# -eq 0 ] || printf ' "%s"' "$@")
lines=$(for seed in ${SEEDS:-0}; do
  suffix=-seed$seed
  [ "$seed" != 0 ] || suffix=
  while read -r name flags; do
    [ -z "$name" ] || echo "--name $name$suffix $flags --seed $seed$more"
  done <<<"$runs"
done)
[ -n "$lines" ] || fail "the list has no such line (see --list)"
exec xargs -P "$JOBS" -L 1 bash -c \
  'python "$0" "$@" || { echo "sweep.sh: failed: $2" >&2; exit 1; }' "$train" <<<"$lines"
