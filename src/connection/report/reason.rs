//! The reason words for connections that failed or were refused, as one closed list, each with its meaning and what to
//! check. docs/operate.md shows them as a table.

macro_rules! reasons {
    ($($name:ident $word:literal $advice:literal;)+) => {
        /// Why a connection failed: the word `reason` of the access log and of `culvert_connection_failures_total`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason {
            $(#[doc = $advice] $name,)+
        }

        impl Reason {
            /// All reasons, in the order of the table in docs/operate.md.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// The reason word.
            pub fn word(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)+
                }
            }

            /// Meaning, and what to check.
            pub fn advice(self) -> &'static str {
                match self {
                    $(Self::$name => $advice,)+
                }
            }
        }
    };
}

reasons! {
    Denied "denied" "A DENY policy matched; `error` names the policy and the rule";
    NotAllowed "not_allowed" "ALLOW policies apply and none of them matched; `error` names them";
    EgressDenied "egress_denied" "The egress policy of the pod's namespace denies this destination outside the mesh; `error` names the rule, and the DNS names that are known for the address";
    PolicyChange "policy_change" "The connection was open, and the policy named in `error` no longer allows it";
    PolicyUnknown "policy_unknown" "The workload names a policy that the control plane or mesh file has not announced: check the policy named in `error`";
    PeerDenied "peer_denied" "The policies of the destination refused the connection: the log of the destination's node names the rule";
    PeerRefused "peer_refused" "The far end refused the stream: `error` says what its status means, and the far end's log says why";
    PeerTls "peer_tls" "The TLS handshake with a client failed: check the identity in its certificate and the roots that it trusts";
    TunnelTls "tunnel_tls" "The TLS handshake with the destination failed: check the identity in its certificate and the one that was expected";
    Clock "clock" "A certificate is not valid yet, or has expired, by the clock of this node or of the far end: synchronise the clocks; `culvert doctor` compares them";
    CertRevoked "cert_revoked" "The peer's certificate is on the CRL";
    CertExpired "cert_expired" "The peer's certificate has expired, and the peer still used the tunnel that it opened with it: connections that outlive the certificate end there";
    PeerHttp2 "peer_http2" "HTTP/2 with a client broke before its tunnel was open";
    TunnelHttp2 "tunnel_http2" "HTTP/2 with the destination broke before the tunnel was open: check that HBONE listens on port 15008 there";
    PeerSilent "peer_silent" "A client connected to port 15008 and sent nothing: usually a port scan or an unsuitable health check";
    HandshakeLimit "handshake_limit" "Too many connections to port 15008 whose peer has not proven its identity; if they come from one address, `error` names it";
    PeerHandshakeDeadline "peer_handshake_deadline" "A client connected to port 15008 and did not finish its handshake in time";
    TunnelHandshakeDeadline "tunnel_handshake_deadline" "The destination accepted the connection and did not finish the handshake in time: the node may be overloaded or failing";
    TunnelBlocked "tunnel_blocked" "Port 15008 of the destination does not answer: a NetworkPolicy blocks it, or the node is down";
    TunnelConnect "tunnel_connect" "Port 15008 of the destination cannot be reached: there is no route, or nothing listens there";
    StreamRefused "stream_refused" "The destination accepts no more streams (REFUSED_STREAM), even after five attempts";
    TunnelBroken "tunnel_broken" "The tunnel broke while the connection used it: check the log of the far end's node, and the network";
    TunnelCut "tunnel_cut" "This node ended the tunnel because of what its peer did: see the log line `tunnel cut` and the metric `culvert_tunnels_cut_total`";
    Connect "connect" "The destination or the application refused the connection, or there is no route to it";
    ConnectDeadline "connect_deadline" "The destination or the application does not answer";
    AnswerDeadline "answer_deadline" "The far end's node accepted the request and did not answer in time: check its log";
    WaypointUnknown "waypoint_unknown" "The destination's waypoint cannot be found or has no usable endpoint: `error` names it and the reason";
    WaypointBypassed "waypoint_bypassed" "The pod's workload has a waypoint, and the connection has not come through it (`CULVERT_WAYPOINT_CHECK`): the client's facts may be old, or it is not in the mesh";
    NoEndpoint "no_endpoint" "The service has no usable endpoint: check the health of its endpoints and its traffic distribution";
    NoPort "no_port" "The service does not have this port";
    NoAddress "no_address" "The workload or service has no address";
    OtherNetwork "other_network" "The destination is in another network and cannot be reached there: `error` says whether the gateway or the identities behind it are missing";
    Protocol "protocol" "The destination expects a tunnel protocol that this version does not support";
    ApplicationTunnel "application_tunnel" "The waypoint's application tunnel has a protocol or port that this version does not support";
    NameNotResolved "name_not_resolved" "The endpoint only has a host name, and the pod's resolvers cannot resolve it";
    NoAnswer "no_answer" "The on-demand control plane does not answer the question about the address";
    WorkloadUnknown "workload_unknown" "The pod's workload has not been announced yet, or the pod's namespace does not hold its addresses: `/pods` says which";
    BadIdentity "bad_identity" "The mesh facts give a workload an identity that is not a valid SPIFFE name";
    Identity "identity" "There is no certificate for the pod: check the CA";
    IpMismatch "ip_mismatch" "A peer asked for an address that is not the pod's. If the address is behind an interface in the pod (KubeVirt, containers), name the interface in `istio.io/reroute-virtual-interfaces`";
    UnknownHost "unknown_host" "A peer asked for a host name that the pod does not serve";
    Loop "loop" "A connection to one of the daemon's own ports, or one that would come back to the daemon";
    BadRequest "bad_request" "A peer sent a request that is not a valid CONNECT request";
    LargestConsumer "largest_consumer" "The node is above 80 % of its connections, open files or memory (`error` says which), and this pod has the most connections";
    LargestPeer "largest_peer" "The node is above 80 % as for `largest_consumer`, and the peer named in `error` has the most connections to that pod";
    Limit "limit" "The node has reached `CULVERT_MAX_CONNECTIONS` or a limit of open files or memory, or its workers cannot keep up: `error` says which";
    OriginalDestinationUnknown "original_destination_unknown" "The kernel does not know the original destination: connection tracking is full, or rules in the pod were changed";
    Socks "socks" "An application of the pod asked on the SOCKS5 port for something that is not supported, or left: `error` says what";
    Socket "socket" "The connection broke before anything was read from it";
    Netns "netns" "The pod's network namespace cannot be entered: the pod is gone, or the daemon lacks a capability";
    AppReset "app_reset" "The application in the pod of this node reset the connection";
    PeerReset "peer_reset" "The far end reset the connection: its application or its node; the node's log says which";
    HalfClosedSilence "half_closed_silence" "One side had closed, and the other one was silent for `CULVERT_HALF_CLOSED_TIMEOUT`";
    Abandoned "abandoned" "The client gave up before the connection was open";
    Drained "drained" "The daemon ended, or the pod was released, and the deadline for open connections had passed";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documents_have_the_table_of_all_reasons() {
        let rows = Reason::ALL.iter().map(|reason| format!("| `{}` | {} |\n", reason.word(), reason.advice()));
        let table = format!("| reason | what to look at |\n|---|---|\n{}\n", rows.collect::<String>());
        let document = include_str!("../../../docs/operate.md");
        assert!(document.contains(&table), "docs/operate.md should have this table:\n{table}");
        let words: std::collections::BTreeSet<&str> = Reason::ALL.iter().map(|reason| reason.word()).collect();
        assert_eq!(words.len(), Reason::ALL.len(), "one word for one thing");
    }
}
