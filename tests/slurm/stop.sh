#!/usr/bin/env bash
# Stops the daemons that start.sh started, found by their pid files, and removes their folder. munged stays: others may use it.
set -u
dir=${SLURM_TEST_DIR:-/tmp/dpgbench-test-slurm}
export SLURM_CONF=$dir/slurm.conf
for state in PENDING RUNNING SUSPENDED; do scancel --state=$state --me 2>/dev/null; done  # one state at a time is what scancel takes
for _ in $(seq 60); do [ -n "$(squeue -h --me 2>/dev/null)" ] || break; sleep 0.5; done  # they outlive slurmd
for daemon in slurmd slurmctld; do
  [ -s "$dir/$daemon.pid" ] || continue
  pid=$(cat "$dir/$daemon.pid")
  grep -qa "$daemon" "/proc/$pid/cmdline" 2>/dev/null || continue
  kill "$pid"
  for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
done
rm -rf "$dir"
