# For the scripts of the integrations: `part NAME` says what comes, and writes down what the part before it took.
parts_name="" parts_began=$SECONDS
part() {
  [ -z "$parts_name" ] || printf '%5d s    %s\n' $((SECONDS - parts_began)) "$parts_name" >>"${KVKEEP_TIMES:-/dev/null}"
  parts_name=$1 parts_began=$SECONDS
  [ -z "$1" ] || echo "-- $1"
}
trap 'part ""' EXIT
