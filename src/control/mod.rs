//! The sources of mesh facts: the mesh file, or a control plane. Each keeps the store in step with its source.

pub mod file;
mod noted;
pub mod xds;
pub mod yaml;
mod yaml_egress;
mod yaml_policies;
