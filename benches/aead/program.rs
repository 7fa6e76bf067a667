//! Prints how fast AES-128-GCM is alone on this processor, in GB/s on one core, for each library and size, as JSON.

use std::time::{Duration, Instant};

const SIZES: [usize; 2] = [16 * 1024, 1024];
const TAG: usize = 16;
const KEY: [u8; 16] = [7; 16];
const NONCE: [u8; 12] = [9; 12];
const TIME: Duration = Duration::from_millis(100);

/// The two libraries have the same interface.
macro_rules! measure {
    ($aead:ident) => {{
        use $aead::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
        let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &KEY).expect("the key has this length"));
        let nonce = || Nonce::assume_unique_for_key(NONCE);
        let seal = |record: &mut [u8]| {
            let (content, tag) = record.split_at_mut(record.len() - TAG);
            let sealed = key.seal_in_place_separate_tag(nonce(), Aad::empty(), content).expect("it is short enough");
            tag.copy_from_slice(sealed.as_ref());
        };
        let open = |record: &mut [u8]| {
            key.open_in_place(nonce(), Aad::empty(), record).expect("it was sealed with this key");
        };
        SIZES.map(|size| {
            let mut record = vec![5; size + TAG];
            let sealing = seconds(|| seal(&mut record));
            let both = seconds(|| {
                seal(&mut record);
                open(&mut record);
            });
            let speed = |seconds: f64| size as f64 / seconds / 1e9;
            format!("\"seal_{size}\": {:.2}, \"open_{size}\": {:.2}", speed(sealing), speed(both - sealing))
        })
    }};
}

fn main() {
    let (aws_lc, ring) = (measure!(aws_lc_rs).join(", "), measure!(ring).join(", "));
    println!("{{\"aws-lc\": {{{aws_lc}}}, \"ring\": {{{ring}}}}}");
}

/// Of one turn, the least of five times.
fn seconds(mut turn: impl FnMut()) -> f64 {
    let mut least = f64::INFINITY;
    for _ in 0..5 {
        let (began, mut turns) = (Instant::now(), 0_u32);
        while began.elapsed() < TIME {
            for _ in 0..64 {
                turn();
            }
            turns += 64;
        }
        least = least.min(began.elapsed().as_secs_f64() / f64::from(turns));
    }
    least
}
