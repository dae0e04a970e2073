#!/usr/bin/env bash
# Real SLURM with two nodes on one machine: slurm_rig.sh FOLDER... The first gets its files; nodes see all of them,
# also those in /tmp.
# Needs root, and Debian's slurm-wlm, munge and iproute2.
# Each node has its own network, processes, host name, /tmp and /dev/shm. Everything ends with this process.
# To run a command inside: nsenter, with the file descriptors of the process whose id is in FOLDER/pid (see rig.py).
set -euo pipefail
folder=$1 seen=("$@") here=$(dirname "$0")
if [ "${RIG_INSIDE:-}" != yes ]; then
  exec env RIG_INSIDE=yes unshare --mount --pid --fork --kill-child --mount-proc --uts --net --propagation private "$0" "$@"
fi
hostname ctl
mkdir -p "$folder"/{slurm,munge,log,spool,run}
for place in etc/slurm:slurm etc/munge:munge var/log:log var/spool:spool run/munge:run; do
  mkdir -p "/${place%%:*}" && mount --bind "$folder/${place##*:}" "/${place%%:*}"
done
printf '127.0.0.1 localhost\n10.77.0.1 n1\n10.77.0.2 n2\n10.77.0.254 ctl\n' > "$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
mkdir -p /var/log/munge /var/spool/munge && chmod 755 /run/munge
head -c 1024 /dev/urandom > /etc/munge/munge.key && chmod 400 /etc/munge/munge.key
mkdir -p /var/lib/munge && mount -t tmpfs tmpfs /var/lib/munge
chown -R munge /etc/munge /run/munge /var/log/munge /var/lib/munge && chmod 700 /etc/munge /var/log/munge /var/lib/munge
runuser -u munge -- /usr/sbin/munged --force

ip link set lo up
ip link add br0 type bridge && ip link set br0 up && ip addr add 10.77.0.254/24 dev br0
cat > /etc/slurm/slurm.conf <<CONF
ClusterName=rig
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=requeue_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdTimeout=15
KillWait=5
MinJobAge=3600
SlurmctldPidFile=/run/munge/slurmctld.pid
SlurmdPidFile=/run/munge/slurmd-%n.pid
SlurmdSpoolDir=/var/spool/slurmd-%n
StateSaveLocation=/var/spool/slurmctld
SlurmctldLogFile=/var/log/ctld.log
SlurmdLogFile=/var/log/%n.log
NodeName=n1 NodeAddr=10.77.0.1 CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=6000 State=UNKNOWN
NodeName=n2 NodeAddr=10.77.0.2 CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=6000 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10
CONF
slurmctld
node() {
  unshare --net --uts --pid --mount --fork --kill-child --mount-proc --propagation private "$here/node.sh" "$1" "10.77.0.${1#n}" \
    "${seen[@]}" -- slurmd -D -N "$1" > "$folder/log/$1.out" 2>&1 &
  echo $! > "$folder/$1.pid"
  until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
  ip link add "v$1" type veth peer name eth0 netns $!
  ip link set "v$1" master br0 up
}
node n1
node n2
# A node that was killed comes back when it is asked for.
while sleep 0.5; do
  for name in n1 n2; do
    if [ -e "$folder/revive-$name" ]; then
      rm "$folder/revive-$name"
      ip link del "v$name" 2> /dev/null || true
      node "$name"
    fi
  done
done
