#!/usr/bin/env bash
# Every run of the paper. Finished runs are skipped, interrupted ones go on, and one that fails does not stop the others.
#   bash sweep.sh                         the paper's 16 runs, one after another
#   bash sweep.sh --list                  every run's name and flags
#   bash sweep.sh vgg08 vgg106            some of them; the extras run only when named
#   bash sweep.sh vgg08 -- --epochs 5     flags after -- go to every run; other settings need a folder of their own (--out runs-short)
#   JOBS=4 SEEDS="0 1 2" bash sweep.sh    four at once, three seeds of each
#   sbatch --gres=gpu:1 --array=1-16 sweep.sh    SLURM, one line of the list each (17-19 are the extras)
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

# Not in the paper: a net that does have 106 layers, a batch size only its author's logs have, residual connections without BN.
EXTRAS='vgg106               --bn --residual --wd 1e-3 --stages 4 --blocks 12
vgg38_rn_batch64     --bn --residual --wd 1e-3 --batch-size 64
vgg38_residual_only  --residual'

usage() { echo "sweep.sh: $1" >&2; exit 2; }

runs=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  if [ "$1" = --list ]; then echo "$RUNS"; echo "$EXTRAS" | sed 's/$/  # extra/'; exit; fi
  line=$(printf '%s\n' "$RUNS" "$EXTRAS" | awk -v name="$1" '$1 == name')
  [ -n "$line" ] || usage "no run is called $1: bash sweep.sh --list shows them all, and flags for train.py go after --"
  runs+=$line$'\n'; shift
done
[ $# -eq 0 ] || shift  # the --
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  runs=$(printf '%s\n' "${runs:-$RUNS$'\n'$EXTRAS}" | sed -n "${SLURM_ARRAY_TASK_ID}p")
  [ -n "$runs" ] || usage "there is no line $SLURM_ARRAY_TASK_ID: bash sweep.sh --list"
fi
export JOBS=${JOBS:-1}
[[ $JOBS =~ ^[1-9][0-9]*$ ]] || usage "JOBS is how many runs at once, not $JOBS"
for seed in ${SEEDS:=0}; do [[ $seed =~ ^[0-9]+$ ]] || usage "SEEDS is a list of whole numbers, not $SEEDS"; done
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")}" || exit 1  # SLURM runs a copy of this file from elsewhere
cores=$(getconf _NPROCESSORS_ONLN)
[ "$JOBS" -eq 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > JOBS ? cores / JOBS : 1))}  # on a CPU they share the cores
failed=$(mktemp) || exit 1
trap 'rm -f "$failed"' EXIT
export failed PYTHONUNBUFFERED=1

one() {  # "NAME FLAGS" MORE_FLAGS...
  local name flags
  read -r name flags <<<"$1"; shift
  if [ "$JOBS" -eq 1 ]; then echo "== $name"; python train.py --name "$name" $flags "$@"
  else  # not awk: mawk holds lines back; the trap leaves train.py's last words a reader on Ctrl-C
    set -o pipefail; python train.py --name "$name" $flags "$@" 2>&1 | (trap '' INT; while IFS= read -r line; do echo "$name: $line"; done)
  fi
  case $? in 0) ;; 130) exit 255 ;; *) echo "$name" >>"$failed" ;; esac  # after Ctrl-C, 255 has xargs start no more
}
export -f one

for seed in $SEEDS; do  # seed 0 has the run's plain name
  printf '%s\n' "${runs:-$RUNS}" | awk -v seed="$seed" 'NF { name = $1 (seed ? "-seed" seed : ""); $1 = ""; print name, "--seed", seed $0 }'
done | xargs -P "$JOBS" -I @RUN@ bash -c 'one "$@"' one @RUN@ "$@"
status=$?
if [ -s "$failed" ]; then echo "sweep.sh: failed: $(sort "$failed" | xargs)" >&2; exit 1; fi
[ $status -eq 0 ] || exit 130
echo "sweep.sh: all done"
