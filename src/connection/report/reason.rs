//! The words for how connections end badly, in one closed list, each with what to look at. README.md shows it as a table.

macro_rules! reasons {
    ($($name:ident $word:literal $advice:literal;)+) => {
        /// Why a connection failed: the word `reason` of the access log and of `culvert_connection_failures_total`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason {
            $(#[doc = $advice] $name,)+
        }

        impl Reason {
            /// All of them, as README.md lists them.
            #[cfg(test)]
            const ALL: &[Self] = &[$(Self::$name,)+];

            /// The word.
            pub fn word(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)+
                }
            }

            /// What to look at.
            #[cfg(test)]
            fn advice(self) -> &'static str {
                match self {
                    $(Self::$name => $advice,)+
                }
            }
        }
    };
}

reasons! {
    Denied "denied" "the DENY policy and rule named in `error`";
    NotAllowed "not_allowed" "the ALLOW policies named in `error`: none of them allows it";
    PolicyChange "policy_change" "it was open, and the policy named in `error` has changed";
    PolicyUnknown "policy_unknown" "the workload names a policy that nobody has told of";
    PeerDenied "peer_denied" "the destination's node refused by its policies: its log names the rule";
    PeerRefused "peer_refused" "the far end refused the stream; `error` says what its status means, and its log why";
    PeerTls "peer_tls" "the handshake with a client failed: whom its certificate names, and which roots it has";
    TunnelTls "tunnel_tls" "the handshake with the destination failed: whom its certificate names, and who was expected";
    Clock "clock" "a certificate is not valid by the clock of this node, or ours by the far end's: set the clocks; `culvert doctor`";
    CertRevoked "cert_revoked" "the peer's certificate is on the CRL";
    CertExpired "cert_expired" "the peer's certificate has ended, and it keeps to the tunnel that it opened with it: long connections end there";
    PeerHttp2 "peer_http2" "a client's HTTP/2 broke before its tunnel was there";
    TunnelHttp2 "tunnel_http2" "the destination's HTTP/2 broke before the tunnel was there: is it HBONE that listens on 15008?";
    PeerSilent "peer_silent" "a client connected to 15008 and said nothing: a port scan, or a health check of the wrong kind";
    HandshakeLimit "handshake_limit" "too many connections to 15008 whose peer has not proven who it is: `error` names the address";
    PeerHandshakeDeadline "peer_handshake_deadline" "a client connected to 15008 and did not finish its handshake";
    TunnelHandshakeDeadline "tunnel_handshake_deadline" "the destination took the connection and did not finish the handshake: an overloaded or half-dead node";
    TunnelBlocked "tunnel_blocked" "port 15008 does not answer: a NetworkPolicy, or a dead node";
    TunnelConnect "tunnel_connect" "port 15008 cannot be reached: no route, or nobody listens there";
    StreamRefused "stream_refused" "the destination's tunnel takes no more streams (REFUSED_STREAM), also after five attempts";
    TunnelBroken "tunnel_broken" "the tunnel broke under the connection: the far node's log, and the network";
    TunnelCut "tunnel_cut" "this node has ended the tunnel because of what its peer did: the line `tunnel cut`, and `culvert_tunnels_cut`";
    Connect "connect" "the destination, or the application, refuses connections or has no route";
    ConnectDeadline "connect_deadline" "the destination, or the application, does not answer";
    AnswerDeadline "answer_deadline" "the far end's node took the stream and did not answer: its log";
    WaypointUnknown "waypoint_unknown" "a waypoint is named and nobody has told of it";
    NoEndpoint "no_endpoint" "the service has no usable endpoint: their health, and the traffic distribution";
    NoPort "no_port" "the service has no such port";
    NoAddress "no_address" "the workload or service has no address";
    OtherNetwork "other_network" "the destination is in another network, to which there are no gateways yet";
    Protocol "protocol" "the destination takes tunnels of a kind that is newer than this version";
    ApplicationTunnel "application_tunnel" "the waypoint's application tunnel is of a kind that is not known here";
    NameNotResolved "name_not_resolved" "the endpoint has a host name only, and the pod's resolvers do not know it";
    NoAnswer "no_answer" "the control plane, asked for the address on demand, says nothing";
    WorkloadUnknown "workload_unknown" "nobody has told of the pod yet, or its namespace does not hold its addresses: `/pods` says which";
    BadIdentity "bad_identity" "the facts give a workload an identity that cannot be one";
    Identity "identity" "there is no certificate: the CA";
    IpMismatch "ip_mismatch" "asked for an address that is not the pod's; where it is behind an interface in the pod (KubeVirt, containers), `istio.io/reroute-virtual-interfaces` names that";
    UnknownHost "unknown_host" "asked for a host name of which the pod serves nothing";
    Loop "loop" "somebody connects to the daemon's own ports";
    BadRequest "bad_request" "a peer's request is no CONNECT as HBONE has it";
    Request "request" "a request of ours could not be written: report it";
    LargestConsumer "largest_consumer" "the node is above 80 % of its connections, open files or memory, and this pod has the most connections: `error` says of what";
    LargestPeer "largest_peer" "the same, and of the pod's peers the one named in `error` has the most";
    Limit "limit" "`CULVERT_MAX_CONNECTIONS`, or the open-files limit";
    OriginalDestinationUnknown "original_destination_unknown" "the kernel does not know where it was going: connection tracking is full, or rules in the pod were changed";
    Socket "socket" "the connection broke before anything was read from it";
    Netns "netns" "the pod's network namespace cannot be entered: is the pod gone? else the daemon's rights";
    AppReset "app_reset" "the application on this side reset it";
    PeerReset "peer_reset" "the far end reset it: its application, or its node, whose log says which";
    HalfClosedSilence "half_closed_silence" "one side had closed, and the other was silent for `CULVERT_HALF_CLOSED_TIMEOUT`";
    Abandoned "abandoned" "the client gave up before the connection was there";
    Drained "drained" "the daemon ended, or the pod was released";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_has_the_table_of_all_reasons() {
        let rows = Reason::ALL.iter().map(|reason| format!("| `{}` | {} |\n", reason.word(), reason.advice()));
        let table = format!("| reason | what to look at |\n|---|---|\n{}\n", rows.collect::<String>());
        let readme = include_str!("../../../README.md");
        assert!(readme.contains(&table), "README.md should have this table:\n{table}");
        let words: std::collections::BTreeSet<&str> = Reason::ALL.iter().map(|reason| reason.word()).collect();
        assert_eq!(words.len(), Reason::ALL.len(), "one word for one thing");
    }
}
