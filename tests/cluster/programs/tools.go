//go:build tools

// Package tools names the programs of other modules that scripts/cluster builds.
package tools

import (
	_ "helm.sh/helm/v3/cmd/helm"
	_ "istio.io/istio/cni/cmd/install-cni"
	_ "istio.io/istio/cni/cmd/istio-cni"
	_ "istio.io/istio/istioctl/cmd/istioctl"
	_ "istio.io/istio/pilot/cmd/pilot-discovery"
)
