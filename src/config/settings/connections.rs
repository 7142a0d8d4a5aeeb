//! Settings of the data plane: addresses, threads, limits, HTTP/2 and TCP.

use crate::config::kind::{Custom, Number, Switch, Time, Words};
use crate::config::parse::{self, Threads};
use crate::config::setting::{Described, Setting};
use crate::connection::config::WaypointCheck;
use serde_json::json;

/// Sizes that HTTP/2 accepts for a window (RFC 9113, sections 6.5.2 and 6.9.1); a smaller one than the protocol's
/// default is refused.
const WINDOW: Number<u32> = Number(65_535, 2_147_483_647);
/// Sizes that HTTP/2 accepts for a frame (RFC 9113, section 6.5.2).
const FRAME: Number<u32> = Number(16_384, 16_777_215);

/// Words of `CULVERT_WAYPOINT_CHECK`.
const WAYPOINT_CHECKS: Words<WaypointCheck> =
    Words(&[("off", WaypointCheck::Off), ("report", WaypointCheck::Report), ("enforce", WaypointCheck::Enforce)]);

settings! {
    IPV6: Switch = Setting::new("ipv6", "IPV6_ENABLED", Switch)
        .or("true")
        .help("Use IPv6. Without it, IPv6 TCP of captured pods is refused.")
        .shown("ipv6Enabled", |c| json!(c.node.ipv6));
    KEEP_SOURCE: Switch = Setting::new("keep-source", "ENABLE_ORIG_SRC", Switch)
        .or("true")
        .help("Show applications the original client's address. Where that is not possible, the connection fails.")
        .shown("requireOriginalSource", |c| json!(c.connection.sockets.keep_source));
    SOCKS: Switch = Setting::new("socks5", "UNSTABLE_ENABLE_SOCKS5", Switch)
        .or("false")
        .help("Serve SOCKS5 on port 15080 of each captured pod's loopback address, for applications that ask for their connections.")
        .shown("socks5Enabled", |c| json!(c.node.socks));
    WORKERS: Custom<Threads> = Setting::new("workers", "ZTUNNEL_WORKER_THREADS", parse::THREADS)
        .or_else("a quarter of the CPUs, at least 2")
        .help("Worker threads: a number, 0 for as many as there are CPUs, or a share of the CPUs such as `50%`.")
        .shown("numWorkerThreads", |c| json!(c.connection.workers));
    CPU_LIMIT: Number<usize> = Setting::new("cpu-limit", "ZTUNNEL_CPU_LIMIT", Number(1, 4096))
        .or_else("the CPUs of the machine")
        .help("CPUs that the number of worker threads is derived from.");
    RESOURCE_CPU_LIMIT: Custom<usize> = Setting::new("resource-cpu-limit", "ZTUNNEL_RESOURCE_CPU_LIMIT", parse::CPUS)
        .help("CPU limit of the daemon's container. With it there is one worker thread for each CPU of the limit.");
    RESOURCE_CPU_REQUEST: Custom<usize> =
        Setting::new("resource-cpu-request", "ZTUNNEL_RESOURCE_CPU_REQUEST", parse::CPUS)
            .help("CPU request of the daemon's container. At least this many worker threads are started, and at least 2 without a CPU limit.");
    MAX_CONNECTIONS: Number<usize> = Setting::new("max-connections", "CULVERT_MAX_CONNECTIONS", Number(1, 10_000_000))
        .or_else("40 % of the open-files limit")
        .help("Connections and streams that may be open at once. Further ones are refused and counted.")
        .shown("maxConnections", |c| json!(c.connection.max_connections));
    SET_ASIDE_MAX: Number<usize> = Setting::new("set-aside-max", "CULVERT_SET_ASIDE_MAX", Number(0, 100))
        .or("50")
        .help(
            "Most endpoints of a service that are set aside at once because connections to them failed, in percent; never all of \
             them. 0 sets none aside.",
        )
        .shown("setAsideMax", |c| json!(c.connection.set_aside_max));
    POOL_STREAMS: Number<usize> = Setting::new("pool-streams", "POOL_MAX_STREAMS_PER_CONNECTION", Number(1, 65_535))
        .or("100")
        .help("Streams on one tunnel before another tunnel is opened.")
        .shown("poolMaxStreamsPerConn", |c| json!(c.connection.pool.max_streams));
    POOL_IDLE: Time = Setting::new("pool-idle", "POOL_UNUSED_RELEASE_TIMEOUT", Time::ANY)
        .or("5m")
        .help("Idle time after which a tunnel is closed.")
        .shown("poolUnusedReleaseTimeout", |c| parse::shown_duration(c.connection.pool.idle));
    STREAM_WINDOW: Number<u32> = Setting::new("stream-window", "HTTP2_STREAM_WINDOW_SIZE", WINDOW)
        .or("4194304")
        .help("HTTP/2 window of a stream, in bytes.")
        .shown("windowSize", |c| json!(c.connection.hbone.stream_window));
    CONNECTION_WINDOW: Number<u32> = Setting::new("connection-window", "HTTP2_CONNECTION_WINDOW_SIZE", WINDOW)
        .or("16777216")
        .help("HTTP/2 window of a tunnel, in bytes.")
        .shown("connectionWindowSize", |c| json!(c.connection.hbone.connection_window));
    FRAME_SIZE: Number<u32> = Setting::new("frame-size", "HTTP2_FRAME_SIZE", FRAME)
        .or("1048576")
        .help("Largest HTTP/2 frame that is accepted, in bytes.")
        .shown("frameSize", |c| json!(c.connection.hbone.frame_size));
    KEEPALIVE: Switch = Setting::new("keepalive", "KEEPALIVE_ENABLED", Switch)
        .or("true")
        .help("TCP keepalive on every leg.")
        .shown("socketConfig.keepaliveEnabled", |c| json!(c.connection.sockets.legs.keepalive.is_some()));
    KEEPALIVE_TIME: Time = Setting::new("keepalive-time", "KEEPALIVE_TIME", Time::KEEPALIVE)
        .or("180s")
        .help("Silence before the first keepalive packet.")
        .shown("socketConfig.keepaliveTime", |c| {
            json!(c.connection.sockets.legs.keepalive.map(|k| parse::shown_duration(k.time)))
        });
    KEEPALIVE_INTERVAL: Time = Setting::new("keepalive-interval", "KEEPALIVE_INTERVAL", Time::KEEPALIVE)
        .or("180s")
        .help("Time between keepalive packets.")
        .shown("socketConfig.keepaliveInterval", |c| {
            json!(c.connection.sockets.legs.keepalive.map(|k| parse::shown_duration(k.interval)))
        });
    KEEPALIVE_RETRIES: Number<u32> = Setting::new("keepalive-retries", "KEEPALIVE_RETRIES", Number(1, 127))
        .or("9")
        .help("Unanswered keepalive packets after which a connection is given up.")
        .shown("socketConfig.keepaliveRetries", |c| {
            json!(c.connection.sockets.legs.keepalive.map(|k| k.retries))
        });
    USER_TIMEOUT: Switch = Setting::new("user-timeout", "USER_TIMEOUT_ENABLED", Switch)
        .or("true")
        .help(
            "Give up a connection whose data has not been acknowledged for keepalive time + retries × interval (ztunnel's default is \
             false). Tunnels always have such a limit, of at most 50 s.",
        )
        .shown("socketConfig.userTimeoutEnabled", |c| {
            json!(c.connection.sockets.legs.keepalive.is_some_and(|k| k.user_timeout))
        });
    HALF_CLOSED: Time = Setting::new("half-closed", "CULVERT_HALF_CLOSED_TIMEOUT", Time::ANY)
        .or("1h")
        .help("Silence after which a half-closed connection is given up.")
        .shown("halfClosedTimeout", |c| parse::shown_duration(c.connection.hbone.half_closed_silence));
    RESPONSE_BAGGAGE: Switch = Setting::new("response-baggage", "ENABLE_RESPONSE_BAGGAGE", Switch)
        .or("true")
        .help("Send the baggage of the accepting workload with the 200 of an accepted stream.")
        .shown("enableResponseBaggage", |c| json!(c.connection.response_baggage));
    WAYPOINT_CHECK: Words<WaypointCheck> = Setting::new("waypoint-check", "CULVERT_WAYPOINT_CHECK", WAYPOINT_CHECKS)
        .or("report")
        .help(
            "What happens to connections to a pod whose workload has a waypoint, if they have not come through it: `report` counts \
             and logs them, `enforce` refuses them.",
        )
        .shown("waypointCheck", |c| json!(c.connection.waypoint_check.word()));
    LOCALHOST_APP_TUNNEL: Switch = Setting::new("localhost-app-tunnel", "LOCALHOST_APP_TUNNEL", Switch)
        .or("true")
        .help("Deliver streams that begin with a PROXY protocol header to the pod's loopback address.")
        .shown("localhostAppTunnel", |c| json!(c.connection.localhost_app_tunnel));
}
