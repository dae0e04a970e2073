#!/usr/bin/env bash
# A node of a cluster on one machine: node.sh NAME ADDRESS FOLDER... -- COMMAND. It sees the folders, also those in /tmp,
# and has its own host name, /tmp and /dev/shm. Call it with unshare; its network, eth0, comes from outside.
set -eu
name=$1 address=$2 seen=()
shift 2
until [ "$1" = -- ]; do
  seen+=("$1")
  shift
done
shift
hostname "$name"
mount -t tmpfs tmpfs /mnt
for at in "${!seen[@]}"; do
  mkdir "/mnt/$at" && mount --bind "${seen[at]}" "/mnt/$at"
done
mount -t tmpfs tmpfs /tmp && mount -t tmpfs -o size=2g tmpfs /dev/shm
for at in "${!seen[@]}"; do
  mkdir -p "${seen[at]}" && mount --bind "/mnt/$at" "${seen[at]}"
done
chmod 1777 /tmp /dev/shm
until ip link show eth0 > /dev/null 2>&1; do sleep 0.1; done
ip link set lo up && ip addr add "$address/24" dev eth0 && ip link set eth0 up
# This shell is the node's first process, which buries those that nobody waits for. slurmd does not.
"$@" &
wait $!
