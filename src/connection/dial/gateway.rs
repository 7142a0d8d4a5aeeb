//! Opening a stream to another network: through a tunnel that is inside a stream of the tunnel to a gateway.
//!
//! Both tunnels are pooled. The gateway proves its own identity on the outer one, and the far end proves its identity on
//! the inner one, of which the gateway passes on every byte. The gateway chooses the endpoint when it is asked for an
//! inner tunnel, so all streams of one reach the same endpoint.

use super::error::{DialError, HANDSHAKE_DEADLINE, TunnelDialError};
use super::hbone::{OpenedStream, Origin, Wanted, make, open, open_on};
use super::pool::{Behind, DialledTunnel, Pool};
use crate::connection::choose::GatewayHop;
use crate::hbone::carrier::carry_tunnel;
use crate::hbone::{ConnectRequest, TunnelError};
use std::io;
use std::sync::Arc;

/// Opens a stream to what is behind a gateway. `request` is for the far end. `going_away` is called for each inner tunnel
/// that is replaced.
pub async fn open_behind(
    pool: &Arc<Pool>,
    origin: &Origin,
    hop: &GatewayHop,
    request: &ConnectRequest,
    going_away: &(dyn Fn() + Sync),
) -> Result<OpenedStream, DialError> {
    let GatewayHop { outer, expected, endpoints } = hop;
    let behind = Behind { gateway: outer.expected.clone(), authority: request.authority.clone() };
    let key = origin.key(outer, expected, Some(behind));
    let spread = usize::try_from(*endpoints).unwrap_or(usize::MAX);
    let dial = || dial(pool.clone(), origin.clone(), hop.clone(), request.clone());
    open_on(pool, &origin.drain, &Wanted { key, spread, going_away }, request, dial).await
}

/// Opens a stream of the gateway's tunnel, and makes a tunnel inside it.
async fn dial(
    pool: Arc<Pool>,
    origin: Origin,
    hop: GatewayHop,
    request: ConnectRequest,
) -> Result<DialledTunnel, TunnelDialError> {
    let GatewayHop { outer, expected, .. } = hop;
    let gateway = || outer.uid.clone();
    // The far end learns which network the connection comes from; the gateway does not ask.
    let to_gateway = ConnectRequest { network: None, ..request };
    let opened = open(&pool, &origin, &outer, &to_gateway, &|| {}).await;
    let OpenedStream { stream, lease, .. } =
        opened.map_err(|error| TunnelDialError::Gateway { gateway: gateway(), error: Box::new(error) })?;
    let behind = |error| TunnelDialError::Behind { gateway: gateway(), error: Box::new(error) };
    let known = lease.as_outer();
    let carried = carry_tunnel(stream, lease, &pool.tasks, origin.hbone.half_closed_silence);
    let (socket, carrier) = carried.map_err(|source| behind(TunnelDialError::Connect { to: outer.to, source }))?;
    let tls = origin.credentials.client(&expected);
    let shake = tokio::time::timeout(HANDSHAKE_DEADLINE, make(&origin, socket, tls, outer.to, Some(&carrier))).await;
    match shake.unwrap_or(Err(TunnelDialError::HandshakeDeadline(outer.to))) {
        Ok(made) => Ok(DialledTunnel { outer: Some(known), ..made }),
        Err(error) => {
            carrier.stop();
            // The end of the stream shows as the end of its socket; say why it ended.
            Err(behind(match (carrier.reason(), error) {
                (Some(reason), TunnelDialError::Tls(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    TunnelDialError::Http2(TunnelError::Carrier(reason))
                }
                (_, error) => error,
            }))
        }
    }
}
