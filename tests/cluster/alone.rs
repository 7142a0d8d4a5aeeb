//! Without Istio: facts from a ConfigMap, certificates from the built-in CA.

use crate::world::{Cluster, Mode, SYSTEM, Sniffer};

#[test]
fn a_chart_a_config_map_and_a_secret_are_a_mesh() {
    let cluster = Cluster::of(Mode::Alone);
    let wire = Sniffer::start(&cluster, "n1");
    cluster.works();
    assert_eq!(wire.found(), 0);
    for node in ["n1", "n2"] {
        let said = cluster.try_kubectl(&["-n", SYSTEM, "exec", &cluster.daemon(node), "--", "culvert", "doctor"]);
        let said = said.unwrap_or_else(|why| panic!("{why}"));
        assert!(!said.contains("FAIL"), "{said}");
    }
}
