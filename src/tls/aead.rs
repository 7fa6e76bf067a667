//! Which library seals and opens TLS records, chosen once at start by what the processor can do.
//!
//! aws-lc has AES-GCM code for AVX-512 and for plain AES-NI, and nothing in between (aws-lc-sys 0.47,
//! `crypto_gcm_avx512_enabled`). ring 0.17 has code for VAES with AVX2, which is about twice as fast as plain AES-NI:
//! 16 KiB were sealed at 7.8 instead of 4.1 GB/s on an AMD family 25 model 1. Most EPYC processors in use and all
//! Intel client processors since 2021 are of that kind. With AVX-512, aws-lc is far ahead (24 GB/s).
//!
//! Only the record layer and the TLS key schedule differ: key exchange, signatures and tokens stay with aws-lc.

use std::fmt;

use rustls::SupportedCipherSuite;
use rustls::crypto::aws_lc_rs::cipher_suite as aws_lc;
use rustls::crypto::ring::cipher_suite as ring;

/// The implementation of AES-GCM, and whether AES is preferred at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aead {
    implementation: Implementation,
    /// The processor has AES instructions. Without them, ChaCha20-Poly1305 is faster and runs in constant time.
    prefers_aes: bool,
}

/// A library that implements AES-GCM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Implementation {
    AwsLc,
    Ring,
}

/// What decides. On processors other than x86-64 only `aes` is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct CpuFeatures {
    aes: bool,
    avx2: bool,
    vaes: bool,
    vpclmulqdq: bool,
    /// F, BW, DQ and VL: what aws-lc asks for.
    avx512: bool,
}

impl Aead {
    /// The fastest on this processor.
    #[must_use]
    pub fn detect() -> Self {
        Self::choose(CpuFeatures::detect())
    }

    /// One implementation on any processor, for comparison.
    #[must_use]
    pub fn forced(implementation: Implementation) -> Self {
        Self { implementation, ..Self::detect() }
    }

    fn choose(cpu: CpuFeatures) -> Self {
        let wide = cpu.vaes && cpu.vpclmulqdq;
        let implementation = if wide && cpu.avx2 && !cpu.avx512 { Implementation::Ring } else { Implementation::AwsLc };
        Self { implementation, prefers_aes: cpu.aes }
    }

    /// The cipher suites in order of preference.
    pub(super) fn cipher_suites(self) -> Vec<SupportedCipherSuite> {
        let (mut suites, chacha20) = (self.aes_gcm(), CHACHA20);
        let at = |suites: &[SupportedCipherSuite]| {
            let of_tls13 = |suite: &SupportedCipherSuite| suite.tls13().is_some();
            suites.iter().position(|suite| !of_tls13(suite)).unwrap_or(suites.len())
        };
        let [first, rest @ ..] = chacha20;
        if self.prefers_aes {
            suites.insert(at(&suites), first);
            suites.extend(rest);
        } else {
            let tls12 = at(&suites);
            suites.splice(tls12..tls12, rest);
            suites.insert(0, first);
        }
        suites
    }

    /// AES-128 comes first: it is faster, and its margin is enough.
    fn aes_gcm(self) -> Vec<SupportedCipherSuite> {
        match self.implementation {
            Implementation::AwsLc => vec![
                aws_lc::TLS13_AES_128_GCM_SHA256,
                aws_lc::TLS13_AES_256_GCM_SHA384,
                aws_lc::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
                aws_lc::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
                aws_lc::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
                aws_lc::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
            ],
            Implementation::Ring => vec![
                ring::TLS13_AES_128_GCM_SHA256,
                ring::TLS13_AES_256_GCM_SHA384,
                ring::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
                ring::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
                ring::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
                ring::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
            ],
        }
    }
}

/// That of TLS 1.3 first.
const CHACHA20: [SupportedCipherSuite; 3] = [
    aws_lc::TLS13_CHACHA20_POLY1305_SHA256,
    aws_lc::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    aws_lc::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
];

impl CpuFeatures {
    #[cfg(target_arch = "x86_64")]
    fn detect() -> Self {
        use std::arch::is_x86_feature_detected as has;
        Self {
            aes: has!("aes") && has!("pclmulqdq"),
            avx2: has!("avx2"),
            vaes: has!("vaes"),
            vpclmulqdq: has!("vpclmulqdq"),
            avx512: has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl"),
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn detect() -> Self {
        Self { aes: std::arch::is_aarch64_feature_detected!("aes"), ..Self::default() }
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn detect() -> Self {
        Self::default()
    }
}

impl Default for Aead {
    fn default() -> Self {
        Self::detect()
    }
}

impl fmt::Display for Aead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.prefers_aes { "AES-GCM of " } else { "ChaCha20-Poly1305 of aws-lc before AES-GCM of " })?;
        f.write_str(match self.implementation {
            Implementation::AwsLc => "aws-lc",
            Implementation::Ring => "ring",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AES: CpuFeatures = CpuFeatures { aes: true, avx2: false, vaes: false, vpclmulqdq: false, avx512: false };
    const VAES: CpuFeatures = CpuFeatures { avx2: true, vaes: true, vpclmulqdq: true, ..AES };
    const AVX512: CpuFeatures = CpuFeatures { avx512: true, ..VAES };

    #[test]
    fn ring_seals_where_vaes_comes_without_avx512() {
        let chosen = |cpu| Aead::choose(cpu).implementation;
        assert_eq!(chosen(VAES), Implementation::Ring);
        for cpu in [
            CpuFeatures::default(),
            AES,
            AVX512,
            CpuFeatures { avx2: true, ..AES },
            CpuFeatures { vpclmulqdq: false, ..VAES },
            CpuFeatures { vaes: false, ..VAES },
            CpuFeatures { avx2: false, ..VAES },
        ] {
            assert_eq!(chosen(cpu), Implementation::AwsLc, "{cpu:?}");
        }
    }

    /// The names of the suites, those of TLS 1.3 before the others.
    fn names(aead: Aead) -> Vec<&'static str> {
        aead.cipher_suites().iter().filter_map(|suite| suite.suite().as_str()).collect()
    }

    #[test]
    fn every_choice_offers_the_same_suites() {
        let mut every = [AES, VAES, CpuFeatures::default()].map(|cpu| names(Aead::choose(cpu)));
        assert!(every.iter().all(|names| names.len() == 9 && names[..3].iter().all(|name| name.starts_with("TLS13"))));
        every.iter_mut().for_each(|names| names.sort_unstable());
        assert!(every.iter().all(|names| *names == every[0]));
    }

    #[test]
    fn chacha20_comes_first_where_the_processor_has_no_aes() {
        assert_eq!(names(Aead::choose(AES))[0], "TLS13_AES_128_GCM_SHA256");
        let without = names(Aead::choose(CpuFeatures::default()));
        assert_eq!(without[0], "TLS13_CHACHA20_POLY1305_SHA256");
        assert!(without[3].contains("CHACHA20") && without[4].contains("CHACHA20"), "{without:?}");
        assert!(Aead::choose(CpuFeatures::default()).to_string().starts_with("ChaCha20"));
    }
}
