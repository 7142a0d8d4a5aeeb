//! The kinds of objects that are followed, and their events.

use crate::control_plane::facts::api::{self, HasMetadata};
use crate::control_plane::policies;
use crate::mesh::Text;
use kube::Resource;
use kube::core::{ApiResource, DynamicResourceScope, ObjectMeta};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use std::borrow::Cow;
use std::fmt::Debug;

/// A kind of object that is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Pods.
    Pods,
    /// Services.
    Services,
    /// EndpointSlices.
    EndpointSlices,
    /// Nodes.
    Nodes,
    /// Namespaces.
    Namespaces,
    /// Gateways.
    Gateways,
    /// AuthorizationPolicies.
    AuthorizationPolicies,
    /// PeerAuthentications.
    PeerAuthentications,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Pods,
        Self::Services,
        Self::EndpointSlices,
        Self::Nodes,
        Self::Namespaces,
        Self::Gateways,
        Self::AuthorizationPolicies,
        Self::PeerAuthentications,
    ];

    /// Its name in metrics and in the log: that of the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pods => "pods",
            Self::Services => "services",
            Self::EndpointSlices => "endpointslices",
            Self::Nodes => "nodes",
            Self::Namespaces => "namespaces",
            Self::Gateways => "gateways",
            Self::AuthorizationPolicies => "authorizationpolicies",
            Self::PeerAuthentications => "peerauthentications",
        }
    }

    /// Whether a cluster may be without it.
    pub fn is_optional(self) -> bool {
        matches!(self, Self::Gateways | Self::AuthorizationPolicies | Self::PeerAuthentications)
    }
}

/// An object as the API gave it.
#[derive(Debug)]
pub enum Item {
    /// A pod.
    Pod(Box<Object<api::Pod>>),
    /// A service.
    Service(Box<Object<api::Service>>),
    /// A slice.
    Slice(Box<Object<api::EndpointSlice>>),
    /// A node.
    Node(Box<Object<api::Node>>),
    /// A namespace.
    Namespace(Box<Object<api::Namespace>>),
    /// A Gateway.
    Gateway(Box<Object<api::Gateway>>),
    /// An AuthorizationPolicy.
    Authorization(Box<policies::Object>),
    /// A PeerAuthentication.
    Authentication(Box<policies::Object>),
}

/// Namespace (empty if it has none) and name of an object.
pub type Key = (Text, Text);

/// An event of the API.
#[derive(Debug)]
pub enum Event {
    /// A list begins: the objects that follow, until it is complete, are all.
    Begun(Kind),
    /// An object is there.
    Set(Kind, Key, Item),
    /// An object is gone.
    Gone(Kind, Key),
    /// The list is complete.
    Listed(Kind),
    /// The API does not know this kind, so it has no objects.
    Absent(Kind),
}

impl Event {
    /// The kind that it is about.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Begun(kind) | Self::Set(kind, ..) | Self::Gone(kind, _) | Self::Listed(kind) | Self::Absent(kind) => {
                *kind
            }
        }
    }
}

/// A type of object that the library can list and watch.
pub trait Watched: HasMetadata + DeserializeOwned + Clone + Debug + Send + 'static {
    /// Group of the API.
    const GROUP: &'static str;
    /// Version of the API.
    const VERSION: &'static str = "v1";
    /// Kind.
    const KIND: &'static str;
    /// Name in paths.
    const PLURAL: &'static str;
    /// Whether only metadata is asked for.
    const ONLY_METADATA: bool = false;
}

impl Watched for api::Pod {
    const GROUP: &'static str = "";
    const KIND: &'static str = "Pod";
    const PLURAL: &'static str = "pods";
}

impl Watched for api::Service {
    const GROUP: &'static str = "";
    const KIND: &'static str = "Service";
    const PLURAL: &'static str = "services";
}

impl Watched for api::EndpointSlice {
    const GROUP: &'static str = "discovery.k8s.io";
    const KIND: &'static str = "EndpointSlice";
    const PLURAL: &'static str = "endpointslices";
}

impl Watched for api::Node {
    const GROUP: &'static str = "";
    const KIND: &'static str = "Node";
    const PLURAL: &'static str = "nodes";
    const ONLY_METADATA: bool = true;
}

impl Watched for api::Namespace {
    const GROUP: &'static str = "";
    const KIND: &'static str = "Namespace";
    const PLURAL: &'static str = "namespaces";
    const ONLY_METADATA: bool = true;
}

impl Watched for api::Gateway {
    const GROUP: &'static str = "gateway.networking.k8s.io";
    const KIND: &'static str = "Gateway";
    const PLURAL: &'static str = "gateways";
}

/// Metadata as the library asks for it.
fn meta(own: &api::Metadata) -> ObjectMeta {
    ObjectMeta {
        name: own.name.clone(),
        namespace: own.namespace.clone(),
        resource_version: own.resource_version.clone(),
        ..ObjectMeta::default()
    }
}

/// An object, with the metadata that the library asks for.
#[derive(Clone, Debug)]
pub struct Object<T> {
    metadata: ObjectMeta,
    /// The fields that are needed.
    pub content: T,
}

impl<'de, T: Watched> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let content = T::deserialize(deserializer)?;
        Ok(Self { metadata: meta(content.metadata()), content })
    }
}

impl<T: Watched> Resource for Object<T> {
    type DynamicType = ();
    type Scope = DynamicResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        T::KIND.into()
    }

    fn group((): &()) -> Cow<'_, str> {
        T::GROUP.into()
    }

    fn version((): &()) -> Cow<'_, str> {
        T::VERSION.into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        T::PLURAL.into()
    }

    fn metadata_api() -> bool {
        T::ONLY_METADATA
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// A policy, of the kind that the list is of.
#[derive(Clone, Debug)]
pub struct Policy {
    metadata: ObjectMeta,
    /// What is needed of it.
    pub content: policies::Object,
}

impl<'de> Deserialize<'de> for Policy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = policies::Written::deserialize(deserializer)?;
        Ok(Self { metadata: meta(written.metadata()), content: written.into() })
    }
}

impl Resource for Policy {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(of: &ApiResource) -> Cow<'_, str> {
        of.kind.as_str().into()
    }

    fn group(of: &ApiResource) -> Cow<'_, str> {
        of.group.as_str().into()
    }

    fn version(of: &ApiResource) -> Cow<'_, str> {
        of.version.as_str().into()
    }

    fn plural(of: &ApiResource) -> Cow<'_, str> {
        of.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
