#!/usr/bin/env bash
# Boots a SLURM cluster of two nodes on this machine: up.sh RUN_FOLDER   (root; slurm-wlm, munge, iproute2; no systemd)
# Each node is a set of namespaces (net, uts, pid, ipc, mount) with a name and an address of its own on a private bridge,
# so that a job which confuses its nodes fails here as it would on a cluster. Afterwards:
#     export SLURM_CONF=RUN_FOLDER/slurm.conf; sinfo; sbatch ...
#     kill -9 $(cat RUN_FOLDER/pid/node.n2)     power loss of n2; node.sh RUN_FOLDER n2 boots it again
#     ip link set ccs2 down                     n2 cut off the network
# Settings of a test cluster, not of a real one: everything that waits waits for seconds.
set -euo pipefail
run=$1 here=$(cd "$(dirname "$0")" && pwd) host=$(hostname -s) net=10.87.0
nodes=(1 2) gpus=8 cpus=96 memory=1000000
export SLURM_CONF=$run/slurm.conf

rm -rf "$run"
mkdir -p "$run"/{munge,state,log,dev,pid,spool}
chmod 700 "$run"/munge "$run"/state
chmod 755 "$run"/munge
for ((i = 0; i < gpus; i++)); do mknod "$run/dev/gpu$i" c 1 3; done    # "GPUs": copies of /dev/null, to be scheduled

ip link add ccsbr type bridge
ip addr add $net.254/24 dev ccsbr
ip link set ccsbr up
{
    echo "127.0.0.1 localhost"
    echo "$net.254 $host"
    for i in "${nodes[@]}"; do echo "$net.$i n$i"; done
} >"$run/hosts"
for i in "${nodes[@]}"; do
    mkdir "$run/spool/n$i"
    ip netns add "ccs-n$i"
    ip link add "ccs$i" type veth peer name eth0 netns "ccs-n$i"
    ip link set "ccs$i" master ccsbr up
    ip -n "ccs-n$i" link set lo up
    ip -n "ccs-n$i" addr add "$net.$i/24" dev eth0
    ip -n "ccs-n$i" link set eth0 up
done

cat >"$SLURM_CONF" <<CONF
ClusterName=ccs
SlurmctldHost=$host($net.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for the credential of its last start to expire: two minutes by default.
AuthInfo=socket=$run/munge/socket,cred_expire=5
StateSaveLocation=$run/state
SlurmdSpoolDir=$run/spool/%n
SlurmctldPidFile=$run/pid/slurmctld
SlurmdPidFile=$run/pid/slurmd.%n
SlurmctldLogFile=$run/log/slurmctld
SlurmdLogFile=$run/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdTimeout=5
MessageTimeout=5
KillWait=20
MinJobAge=3600
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
GresTypes=gpu
NodeName=DEFAULT CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$memory
$(for i in "${nodes[@]}"; do echo "NodeName=n$i NodeAddr=$net.$i Gres=gpu:$gpus State=UNKNOWN"; done)
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
echo "Name=gpu File=$run/dev/gpu[0-$((gpus - 1))]" >"$run/gres.conf"
echo "CgroupPlugin=cgroup/v1" >"$run/cgroup.conf"
(umask 077 && head -c 128 /dev/urandom >"$run/munge/key")
munged --key-file="$run/munge/key" --socket="$run/munge/socket" --pid-file="$run/pid/munged" \
    --log-file="$run/munge/log" --seed-file="$run/munge/seed" </dev/null
slurmctld -c </dev/null >/dev/null 2>&1
for i in "${nodes[@]}"; do "$here/node.sh" "$run" "n$i"; done

for _ in {1..150}; do
    [ "$(sinfo -h -p gpu -t idle -o %D)" = ${#nodes[@]} ] && exit 0
    sleep 0.1
done
sinfo -N -l
tail -n 30 "$run"/log/*
exit 1
