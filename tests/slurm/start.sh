#!/usr/bin/env bash
# A one-node SLURM for the tests: munge, slurmctld and slurmd, without systemd and without cgroups. Root, Debian or Ubuntu. Started twice,
# it changes nothing. SLURM_TEST_DIR holds configuration, state and logs, SLURM_TEST_CPUS is how many CPUs the node says it has; stop.sh stops
# what is started here and nothing else.
set -euo pipefail
dir=${SLURM_TEST_DIR:-/tmp/dpgbench-test-slurm}
host=$(hostname -s)
cpus=${SLURM_TEST_CPUS:-4}
[ "$(id -u)" = 0 ] || { echo "starting slurmctld, slurmd and munged takes root" >&2; exit 1; }
command -v apt-get >/dev/null || { echo "this script installs SLURM with apt-get, and there is none" >&2; exit 1; }

missing=()
for package in slurmctld slurmd slurm-client munge; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

runs() { [ -s "$1" ] && grep -qa "$2" "/proc/$(cat "$1")/cmdline" 2>/dev/null; }  # a pid file's process, if it is what it says
until_true() { for _ in $(seq 100); do "$@" >/dev/null 2>&1 && return 0; sleep 0.2; done; return 1; }

# munge: every daemon and command proves who it is with a shared key
[ -s /etc/munge/munge.key ] || { mungekey -c -f; chown munge:munge /etc/munge/munge.key; chmod 400 /etc/munge/munge.key; }
install -d -o munge -g munge -m 755 /run/munge
install -d -o munge -g munge -m 700 /var/log/munge /var/lib/munge
if ! munge -n </dev/null >/dev/null 2>&1; then
  rm -f /run/munge/munge.socket.2 /run/munge/munge.socket.2.lock
  runuser -u munge -- munged --num-threads=2
fi
until_true munge -n </dev/null || { echo "munged did not start" >&2; exit 1; }

# More CPUs than the machine may have, because the tests' jobs mostly wait; jobs are killed for memory by slurmd's own look at them.
# A requeued job waits for its old credential to expire: 5 s, not two minutes. USR2 is sent before preemption as it is before the time
# limit, and half a minute is left for a checkpoint.
if [ ! -s "$dir/slurm.conf" ]; then
  mkdir -p "$dir"/{state,spool,log}
  cat >"$dir/slurm.conf" <<CONF
ClusterName=dpgbenchtest
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
MailProg=/bin/true
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=2,sched_interval=2
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
MinJobAge=3600
KillWait=5
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$((2000 * cpus)) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
CONF
fi
export SLURM_CONF=$dir/slurm.conf
runs "$dir/slurmctld.pid" slurmctld || slurmctld -f "$SLURM_CONF"
until_true scontrol ping || { tail -20 "$dir/log/slurmctld.log" >&2; exit 1; }
runs "$dir/slurmd.pid" slurmd || slurmd -f "$SLURM_CONF"
up() { sinfo -h -N -o %T | grep -qE 'idle|mixed|allocated'; }
until_true up || scontrol update nodename="$host" state=resume || true
until_true up || { sinfo -N -l >&2; tail -20 "$dir/log/slurmd.log" >&2; exit 1; }
echo "export SLURM_CONF=$SLURM_CONF"
