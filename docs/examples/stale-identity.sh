#!/usr/bin/env bash
# The stale-identity experiment on a real cluster, step by step: does a new
# workload pass as the dead one whose IP it got? docs/stale-identity.md tells
# the story. It needs kubectl, a cluster with Portcullis (deploy/), at least two
# nodes for pods, and one command that reaches a node without the API server.
#
#	docs/examples/stale-identity.sh [options]
#
#	--mode lease|classic   how agents believe bindings: the whole cluster is
#	                       switched to it, and back at the end. default: as it is
#	--cause CAUSE          what keeps the news from the agent of helloworld-v1's
#	                       node (default: network):
#	    network      the node is cut off from the API server
#	    upgrade      its agent is replaced by an image that cannot be pulled
#	    slow-agent   its agent gets 1 % of a CPU
#	    starved-agent  it gets 0.1 %
#	    slow-events  the API server's answers trickle in at 500 bytes/s
#	    crash        its agent is killed with SIGKILL, again each second
#	--down SECONDS         end the failure after that; default: it lasts through
#	                       the attempts
#	--udp                  the policies for UDP too, and datagrams beside requests
#	                       (needs images that answer them: those of test/e2e do)
#	--keep                 leave the workloads at the end
#
# Environment: KUBECTL (default kubectl), NAMESPACE (stale-identity), ON_NODE: a
# command that runs `sh -s` on a node as root, called as $ON_NODE NODE sh -s
# (default ssh; on a cluster of make e2e-up: "go run ./test/e2e/cluster/cmd node").
#
# It ends with 0 when everything was as its mode promises, else with 1.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
KUBECTL=${KUBECTL:-kubectl} ON_NODE=${ON_NODE:-ssh} NAMESPACE=${NAMESPACE:-stale-identity}
mode='' cause=network down='' udp='' keep=''
while [ $# -gt 0 ]; do
	case $1 in
	--mode) mode=$2 && shift ;;
	--cause) cause=$2 && shift ;;
	--down) down=$2 && shift ;;
	--udp) udp=1 ;;
	--keep) keep=1 ;;
	*) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0" && exit 2 ;;
	esac
	shift
done
case $cause in network | upgrade | slow-agent | starved-agent | slow-events | crash) ;; *) echo "no cause $cause" >&2 && exit 2 ;; esac
case $mode in '' | lease | classic) ;; *) echo "no mode $mode" >&2 && exit 2 ;; esac

# ---- small things

k() { $KUBECTL -n "$NAMESPACE" "$@"; }
p() { $KUBECTL -n portcullis "$@"; }
began=$SECONDS
step() { printf '\n[%4d s] %s\n' $((SECONDS - began)) "$*"; }
say() { printf '         %s\n' "$*"; }
failed=''
expect() { # WHAT WANT GOT
	if [ "$2" = "$3" ]; then
		say "ok: $1: $3"
	else
		say "NOT AS PROMISED: $1: $3, expected $2"
		failed=1
	fi
}
on_node() { $ON_NODE "$1" sh -s; } # the script is the standard input

# call POD HOST [TIMES]: does it answer, once in so many times? prints
# "admitted" or "refused". A busy machine may miss the 2 s once.
call() {
	local out i
	for ((i = 0; i < ${3:-1}; i++)); do
		if out=$(k exec "$1" -- curl -s "http://$2:5000/hello" --max-time 2 2>/dev/null) && [[ $out == Hello* ]]; then
			echo admitted
			return
		fi
	done
	echo refused
}
call_udp() {
	local i
	for ((i = 0; i < ${3:-1}; i++)); do
		if k exec "$1" -- /probe check -timeout 2s "udp/$2:5000" 2>/dev/null | grep '"ok":true' >/dev/null; then
			echo admitted
			return
		fi
	done
	echo refused
}

# running VERSION: names and IPs of the sleep pods that run and are not ending.
running() {
	k get pods -l "app=sleep,version=$1" -o jsonpath='{range .items[*]}{.metadata.deletionTimestamp}|{.status.phase}|{.metadata.name}|{.status.podIP}|{.spec.nodeName}{"\n"}{end}' |
		sed -n 's/^|Running|//p' | tr '|' ' '
}

agent_pod() { p get pods -l app.kubernetes.io/name=portcullis-agent --field-selector "spec.nodeName=$node" -o jsonpath='{.items[0].metadata.name}'; }

# wait_agent: until the node's agent is one that is ready.
wait_agent() {
	local i
	for ((i = 0; i < 120; i++)); do
		if p get pods -l app.kubernetes.io/name=portcullis-agent --field-selector "spec.nodeName=$node" \
			-o jsonpath='{range .items[*]}{.metadata.deletionTimestamp}{.status.containerStatuses[0].ready}{"\n"}{end}' | grep -qx true; then
			return 0
		fi
		sleep 1
	done
	return 1
}

# belief IP: what the agent of helloworld-v1's node believes of an IP. Asked on
# the node, with the agent's own binary, as the API server is out of reach.
belief() {
	on_node "$node" <<-EOF 2>/dev/null | sed 's/  */ /g;s/^/         /' || true
		pid=\$(pgrep -o -f '^/portcullis agent') && timeout 5 /proc/\$pid/exe ipcache list | grep -E '^$1 ' || echo '(nothing, or no agent answers)'
	EOF
}

# ---- the mode

settings() { p get configmap portcullis-agent -o jsonpath='{.data.agent\.yaml}'; }
set_mode() {
	local text
	text=$(settings | sed '/^evidence:/d;/^unsafe-classic:/d')
	[ "$1" = lease ] || text+=$'\nevidence: classic\nunsafe-classic: true'
	p create configmap portcullis-agent --from-literal=agent.yaml="$text"$'\n' --dry-run=client -o yaml | p replace -f - >/dev/null
	p rollout restart daemonset/portcullis-agent >/dev/null
	p rollout status daemonset/portcullis-agent --timeout=5m >/dev/null
}
former=lease
settings | grep -q '^evidence: *classic' && former=classic
mode=${mode:-$former}

# ---- the causes: begin_X and end_X; the rest of the cluster goes on as it was

api_addresses() {
	{
		$KUBECTL -n default get service kubernetes -o jsonpath='{.spec.clusterIP}{"\n"}'
		$KUBECTL -n default get endpointslices -l kubernetes.io/service-name=kubernetes -o jsonpath='{range .items[*].endpoints[*].addresses[*]}{@}{"\n"}{end}'
	} | grep -v : | sort -u | paste -sd, -
}
filter() { # what happens to packets of the API server
	say "on $node: nft: packets from $api: $1"
	on_node "$node" <<-EOF
		nft -f - <<END
		table ip stale_identity {
			chain input {
				type filter hook input priority -150; policy accept;
				ip saddr { $api } $1
			}
		}
		END
	EOF
}
unfilter() { on_node "$node" <<<'nft delete table ip stale_identity 2>/dev/null || true'; }

begin_network() { filter drop; }
end_network() { unfilter; }

begin_slow-events() { filter 'limit rate over 500 bytes/second burst 1500 bytes drop'; }
end_slow-events() { unfilter; }

begin_upgrade() {
	say "kubectl -n portcullis set image daemonset/portcullis-agent agent=registry.invalid/portcullis:next, on $node alone"
	image=$(p get daemonset portcullis-agent -o jsonpath='{.spec.template.spec.containers[0].image}')
	p patch daemonset portcullis-agent --type=merge -p '{"spec":{"updateStrategy":{"type":"OnDelete","rollingUpdate":null}}}' >/dev/null
	p set image daemonset/portcullis-agent agent=registry.invalid/portcullis:next >/dev/null
	p delete pod "$(agent_pod)" --wait=true >/dev/null
}
end_upgrade() {
	p set image daemonset/portcullis-agent agent="$image" >/dev/null
	p delete pod "$(agent_pod)" --wait=true >/dev/null
	wait_agent || true # the steps that follow say what came of it
	p patch daemonset portcullis-agent --type=merge -p '{"spec":{"updateStrategy":{"type":"RollingUpdate","rollingUpdate":{"maxUnavailable":1}}}}' >/dev/null
}

cpu() { p patch pod "$1" --subresource resize --type=strategic -p '{"spec":{"containers":[{"name":"agent","resources":{"requests":{"cpu":"'"$2"'"},"limits":{"cpu":"'"$2"'"}}}]}}' >/dev/null; }
begin_slow-agent() {
	slow=$(agent_pod)
	say "kubectl -n portcullis patch pod $slow --subresource resize: limits.cpu 10m"
	cpu "$slow" 10m
}
end_slow-agent() {
	cpu "$slow" 1
	p delete pod "$slow" --wait=true >/dev/null # the next one has no limit
	wait_agent || true
}

# Kubernetes gives 1 % at the least; the kernel 1 ms in each second.
share() { # QUOTA of each second, in us; -1: all
	on_node "$node" <<-EOF
		pid=\$(pgrep -o -f '^/portcullis agent')
		v1=/sys/fs/cgroup/cpu\$(sed -n 's/^[0-9]*:\([^:]*,\)\{0,1\}cpu\(,[^:]*\)\{0,1\}://p' /proc/\$pid/cgroup)
		if [ -e \$v1/cpu.cfs_quota_us ]; then
			echo 1000000 >\$v1/cpu.cfs_period_us && echo $1 >\$v1/cpu.cfs_quota_us
		else
			echo "$1 1000000" | sed s/-1/max/ >/sys/fs/cgroup\$(sed -n 's/^0:://p' /proc/\$pid/cgroup)/cpu.max
		fi
	EOF
}
begin_starved-agent() {
	slow=$(agent_pod)
	say "on $node: 1 ms in each second of CPU time for the control group of $slow"
	share 1000
}
end_starved-agent() {
	share -1
	p delete pod "$slow" --wait=true >/dev/null # as new
	wait_agent || true
}

begin_crash() {
	say "on $node: pkill -KILL of the agent, again each second"
	on_node "$node" <<-'EOF' &
		touch /run/stale-identity-crash
		while [ -e /run/stale-identity-crash ]; do
			pkill -KILL -f '^/portcullis agent'
			sleep 1
		done
	EOF
	crasher=$!
	sleep 2
}
end_crash() {
	on_node "$node" <<<'rm -f /run/stale-identity-crash'
	wait "$crasher" || true
	# The kubelet waits longer after each crash; a new pod does not.
	p delete pod "$(agent_pod)" --wait=true >/dev/null
	wait_agent || true
}

failing=''
begin_failure() {
	failing=1
	"begin_$cause"
}
end_failure() {
	[ -n "$failing" ] || return 0
	failing=''
	"end_$cause"
}

node=''
clean_up() {
	local status=$?
	trap - EXIT INT TERM
	set +e
	step "cleaning up"
	end_failure
	[ -z "$node" ] || $KUBECTL uncordon "$node" >/dev/null
	[ -n "$keep" ] || $KUBECTL delete namespace "$NAMESPACE" --ignore-not-found --wait=true >/dev/null
	[ "$mode" = "$former" ] || set_mode "$former"
	exit "$status"
}
trap clean_up EXIT
trap 'exit 1' INT TERM

# ---- the experiment

step "mode $mode, cause $cause${down:+ for $down s}"
[ "$mode" = "$former" ] || set_mode "$mode"

step "deploy sleep-v1 x15, sleep-v2 x1, helloworld-v1, helloworld-v2, and both policies"
$KUBECTL create namespace "$NAMESPACE" >/dev/null
k apply -f "$here/stale-identity-app.yaml" >/dev/null
k apply -f "$here/stale-identity-$([ -n "$udp" ] && echo udp || echo policies).yaml" >/dev/null
for d in helloworld-v1 helloworld-v2 sleep-v1 sleep-v2; do k rollout status deployment/$d --timeout=5m >/dev/null; done
node=$(k get pod -l app=helloworld,version=v1 -o jsonpath='{.items[0].spec.nodeName}')
server=$(k get pod -l app=helloworld,version=v1 -o jsonpath='{.items[0].status.podIP}')
api=$(api_addresses)
say "helloworld-v1 has $server on $node"

# matrix: one line for each pair; 0 when it is as the policies say.
matrix() {
	local i j got bad=0
	for i in 1 2; do
		for j in 1 2; do
			got=$(call deploy/sleep-v$i helloworld-v$j)
			say "sleep-v$i -> helloworld-v$j: $got"
			[ "$got" = "$([ $i = $j ] && echo admitted || echo refused)" ] || bad=1
		done
	done
	return $bad
}
eventually_matrix() { # as it takes a moment until policies are enforced
	local i out=''
	for ((i = 0; i < 30; i++)); do
		if out=$(matrix); then
			echo "$out"
			return 0
		fi
		sleep 2
	done
	echo "$out"
	return 1
}
step "who may call whom: only v1 -> v1 and v2 -> v2"
eventually_matrix && ok=yes || ok=no
expect "the matrix of the policies" yes $ok

step "each sleep-v1 calls helloworld-v1, so that $node believes who has each IP"
ips=''
while read -r pod ip where; do
	{ [ "$(call "$pod" "$server" 3)" = admitted ] || say "$pod ($ip, $where): refused"; } &
	[ "$where" = "$node" ] || ips+=" $ip "
done < <(running v1)
wait
say "IPs of sleep-v1 on other nodes:$ips"

step "failure: $cause. $node takes no new pods"
$KUBECTL cordon "$node" >/dev/null
began_failure=$SECONDS
begin_failure
due() { [ -n "$failing" ] && [ -n "$down" ] && [ $((SECONDS - began_failure)) -ge "$down" ]; }
heal_if_due() {
	if due; then
		step "the failure ends, after $((SECONDS - began_failure)) s"
		end_failure
	fi
}

step "scale sleep-v1 to 0 and sleep-v2 to 15; restart sleep-v2 until a pod has an IP of a dead sleep-v1"
k scale deployment sleep-v1 --replicas=0 >/dev/null
k scale deployment sleep-v2 --replicas=15 >/dev/null
pod='' ip=''
for ((round = 1; round <= 60; round++)); do
	k rollout status deployment/sleep-v2 --timeout=3m >/dev/null 2>&1 || say "round $round: not all pods run yet"
	while read -r name its _; do
		if [[ $ips == *" $its "* ]]; then pod=$name ip=$its && break; fi
	done < <(running v2)
	heal_if_due
	[ -z "$pod" ] || break
	say "round $round: no sleep-v2 has one of the IPs yet"
	k rollout restart deployment/sleep-v2 >/dev/null
done
[ -n "$pod" ] || { say "no IP came back in $round rounds" && exit 1; }
say "round $round, $((SECONDS - began_failure)) s into the failure: $pod has $ip, which was a sleep-v1's"

step "the impostor. What $node believes of $ip, before and after the call:"
belief "$ip"
say "kubectl exec $pod -- curl -s http://helloworld-v1:5000/hello --max-time 2"
by_service=$(call "$pod" helloworld-v1 3)
direct=$(call "$pod" "$server" 3)
datagram=${udp:+$(call_udp "$pod" helloworld-v1 3)}
belief "$ip"
want=refused
# Only a failure that lasts and keeps all news away is sure to fool classic.
[ "$mode$cause$down" = classicnetwork ] && want=admitted
if [ "$mode" = lease ] || [ $want = admitted ]; then
	expect "by the service's address" $want "$by_service"
	expect "by the pod's address" $want "$direct"
	[ -z "$udp" ] || expect "by UDP" $want "$datagram"
else
	say "by the service's address: $by_service; by the pod's address: $direct${udp:+; by UDP: $datagram}"
fi

step "a new sleep-v1"
k scale deployment sleep-v1 --replicas=1 >/dev/null
k rollout status deployment/sleep-v1 --timeout=3m >/dev/null
read -r new newip where < <(running v1 | grep -v " $node\$")
got=$(call "$new" helloworld-v1 5)
if [ "$mode" = lease ] && [ "$cause" = network ] || [ -z "$failing" ]; then
	expect "$new ($newip, $where) calls helloworld-v1" admitted "$got"
else
	say "$new ($newip, $where) calls helloworld-v1: $got"
fi

if [ -n "$failing" ]; then
	step "the failure ends, after $((SECONDS - began_failure)) s"
	end_failure
fi
step "afterwards, in either mode, the policies hold again"
$KUBECTL uncordon "$node" >/dev/null
eventually_matrix && ok=yes || ok=no
expect "the matrix of the policies" yes $ok
if k get pod "$pod" >/dev/null 2>&1; then
	expect "the impostor" refused "$(call "$pod" "$server")"
fi

step "verdict of mode $mode, cause $cause${down:+ for $down s}: the impostor was $by_service by the service, $direct directly${udp:+, $datagram by UDP}"
if [ -n "$failed" ]; then
	say "NOT as the mode promises"
	exit 1
fi
if [ "$mode" = classic ] && [ $want = refused ]; then
	say "mode classic promises nothing here"
else
	say "as the mode promises"
fi
