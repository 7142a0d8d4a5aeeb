//! Port 15006: a connection to the pod that arrived in plaintext. Steps: accept, authorize, dial, forward, report. The
//! destination is the original destination, and the client has no identity.

use super::ending::{ResetUnlessDone, stop_signal, unless_client_resets};
use super::lookup::{check_waypoint, own_facts};
use crate::connection::authorize::{Permit, Subject};
use crate::connection::pod::Pod;
use crate::connection::report::stages::Stage;
use crate::connection::report::{Details, Direction, Failure, Record, record::SocketCount};
use crate::connection::worker::{Accepted, Worker};
use crate::connection::{accept, authorize, dial, forward};
use crate::mesh::address::canonical;
use crate::ports::PLAINTEXT;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Carries one plaintext connection to the pod.
pub async fn plaintext(worker: &Arc<Worker>, pod: &Arc<Pod>, Accepted { socket, peer, at }: Accepted) {
    let mut record = Record::accepted(&worker.shared.reporter, &pod.uid, Direction::Inbound, canonical(peer), at);
    record.arrived_in_plaintext();
    let _count = SocketCount::new(&worker.shared.reporter, Direction::Inbound);
    let result = plaintext_steps(worker, pod, socket, peer, &mut record).await;
    record.finish(result);
}

async fn plaintext_steps(
    worker: &Arc<Worker>,
    pod: &Arc<Pod>,
    socket: std::net::TcpStream,
    peer: SocketAddr,
    record: &mut Record,
) -> Result<(), Failure> {
    let shared = &worker.shared;
    let captured = accept::captured(socket, peer, PLAINTEXT)?;
    record.destination(captured.destination);
    let client = ResetUnlessDone::accepted(captured.app);
    let (snapshot, workload) = own_facts(worker, pod).await?;
    record.lap(Stage::Facts);
    let destination = captured.destination;
    pod.with_own(&workload, |own| {
        // The daemon connects to the application from the client's address, and may choose the very port that the
        // client uses for another connection. So a connection with the ends of one of the daemon's is taken for it only
        // if it comes from an address of the pod itself.
        let is_ours = own.is_the_pod(captured.source.ip()) && pod.legs.contains(captured.source, destination);
        own.check_plaintext(destination, is_ours)
    })?;
    let source = captured.source.ip();
    check_waypoint(worker, pod, &workload, source, None).await?;
    let subject = Subject { peer: None, source, destination };
    // Register before asking for the permit, so that no policy change is missed in between.
    let registration = shared.permits.register(&workload, &subject);
    let permit = authorize::authorize(&shared.mesh, &registration).await;
    record.lap(Stage::Policy);
    let live = record.opened(Details {
        source_workload: snapshot.workload_at(&workload.network, source).cloned(),
        source_identity: None,
        destination_workload: Some(workload.clone()),
        destination_identity: None,
        service: snapshot.service_by_target(&workload, destination.port()).cloned(),
        actual: destination,
        authority: None,
        gateway: None,
        rule: permit.as_ref().ok().map(Permit::text),
    });
    drop(snapshot);
    let permit = permit?;
    let app = dial::direct::to_app(&permit, &pod.netns, destination, source, &pod.sockets, &pod.legs);
    let app = ResetUnlessDone::dialled(unless_client_resets(&worker.ticks, &client, app).await?);
    live.leg_port.store(app.own_port(), Ordering::Relaxed);
    record.lap(Stage::Dial);
    record.open();
    let (client, app) = (client.watched()?, app.watched()?);
    let silence = shared.config.hbone.half_closed_silence;
    forward::over_tcp(&app, &client, &*live, silence, stop_signal(pod, Some(&registration))).await?;
    client.done();
    app.done();
    Ok(())
}
