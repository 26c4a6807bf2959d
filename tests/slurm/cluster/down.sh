#!/usr/bin/env bash
# Ends what up.sh started, by the process ids it kept: down.sh RUN_FOLDER
run=$1

gone() { [ ! -e "/proc/$1" ] || grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null; }

end() { # PID_FILE SIGNAL
    local pid
    pid=$(cat "$1" 2>/dev/null) || return 0
    gone "$pid" && return 0
    kill "-$2" "$pid"
    for _ in {1..100}; do
        gone "$pid" && return 0
        sleep 0.05
    done
    kill -9 "$pid"
}

for file in "$run"/pid/node.n*; do end "$file" KILL; done
end "$run/pid/slurmctld" TERM
end "$run/pid/munged" TERM
for name in $(ip netns list | awk '/^ccs-n[0-9]+/ {print $1}'); do ip netns del "$name"; done
for link in $(ip -o link show type veth | grep -oE 'ccs[0-9]+@' | tr -d @); do ip link del "$link" 2>/dev/null; done
ip link del ccsbr 2>/dev/null
exit 0
