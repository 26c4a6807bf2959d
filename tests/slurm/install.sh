#!/usr/bin/env bash
# Installs what the test cluster needs, from Debian's archive. Where that can't be done, the tests say so and skip.
for program in slurmctld slurmd munged ip; do
    command -v "$program" >/dev/null && continue
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "$program is missing, and installing it needs root and apt-get" >&2
        exit 0
    fi
    apt-get install -y -q --no-install-recommends slurm-wlm munge iproute2 ||
        { apt-get update -q && apt-get install -y -q --no-install-recommends slurm-wlm munge iproute2; }
    exit 0
done
