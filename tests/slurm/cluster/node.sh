#!/usr/bin/env bash
# Boots one node: node.sh RUN_FOLDER NAME   (a child of up.sh's cluster; its first process is RUN_FOLDER/pid/node.NAME)
run=$1 name=$2
export SLURM_CONF=$run/slurm.conf
ip netns exec "ccs-$name" unshare --uts --ipc --mount --pid --fork --kill-child --mount-proc bash -c "
    hostname $name
    mount --bind '$run/hosts' /etc/hosts
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    slurmd -D &
    wait" </dev/null >>"$run/log/node.$name" 2>&1 &
echo $! >"$run/pid/node.$name"
