#!/bin/sh
# Gives this node the addresses that a file lists, one a line, and gives them again when somebody takes them away: whoever
# manages the links clears away what it did not put there, each time it sets one up.
set -eu

# The link that leads outside; there is none for a moment after the start.
find_link() {
    for _ in $(seq 100); do
        link=$(ip -o route show default | sed -n '1s/.* dev \([^ ]*\).*/\1/p')
        [ -n "$link" ] && return 0
        sleep 0.1
    done
    echo "mini-llm: no link leads outside, so none can carry the addresses of the facts" >&2
    return 1
}

# IPv4 is led here by the cloud's route alone. For IPv6 its router asks the link who has an address, and only what
# stands on the link itself answers; that another node may have it as well is known. What this node asks of others goes
# out under its own address all the same (a newer one would be preferred), for answers may still be led elsewhere.
carry() {
    while read -r address; do
        case $address in
            *:*) ip address replace "$address/64" dev "$link" nodad preferred_lft 0 ;;
            *) ip address replace "$address/32" dev lo ;;
        esac
    done < "$1"
}

find_link
# The watch begins first, so that nothing is missed between the two.
ip -o monitor address | {
    carry "$1"
    while read -r event; do
        case $event in
            Deleted*) carry "$1" ;;
        esac
    done
}
