//! What is spoken on the wire, generated from `proto/` (see `tests/proto.rs`); nothing here is written by hand.

/// Our own formats.
pub mod culvert {
    /// The file that keeps the last known state.
    pub mod state {
        include!("culvert.state.rs");
    }
}

/// xDS.
pub mod envoy {
    /// Services of xDS.
    pub mod service {
        /// Discovery.
        pub mod discovery {
            /// Its third version.
            pub mod v3 {
                include!("envoy.service.discovery.v3.rs");
            }
        }
    }
}

/// Profiles.
pub mod perftools {
    /// CPU profiles.
    pub mod profiles {
        include!("perftools.profiles.rs");
    }
}

/// Istio's protocols.
pub mod istio {
    /// Policies.
    pub mod security {
        include!("istio.security.rs");
    }
    /// The first version of the CA.
    pub mod v1 {
        /// The CA.
        pub mod auth {
            include!("istio.v1.auth.rs");
        }
    }
    /// Workloads and services.
    pub mod workload {
        include!("istio.workload.rs");
        /// Pods of a node.
        pub mod zds {
            include!("istio.workload.zds.rs");
        }
    }
}
