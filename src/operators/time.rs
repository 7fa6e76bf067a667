//! Times as `%START_TIME(…)%` writes them: strftime's letters, and fractions of a second. All in UTC.
//!
//! The calendar is that of the crate `time`, which certificates bring along. The letters are our own: that crate has no strftime, and
//! `jiff` would be a second calendar in the program, which takes an unknown letter for an error where Envoy leaves it as it is.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use time::UtcDateTime;

/// Envoy's default format of times: milliseconds.
pub(super) const DEFAULT: &str = "%Y-%m-%dT%H:%M:%S.%3fZ";

/// Writes `time` in a form; letters that are not known stay as they are.
pub(super) fn write(time: SystemTime, form: &str) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    let nanoseconds = since.subsec_nanos();
    let at = UtcDateTime::from_unix_timestamp(seconds).unwrap_or(UtcDateTime::MAX);
    let (year, month, day) = at.to_calendar_date();
    let (hour, minute, second) = at.as_hms();
    let mut out = String::with_capacity(form.len() + 16);
    let mut rest = form.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let Some(letter) = rest.next() else {
            out.push('%');
            break;
        };
        // A string takes whatever is written to it.
        let _ = match letter {
            'Y' => write!(out, "{year:04}"),
            'y' => write!(out, "{:02}", year % 100),
            'm' => write!(out, "{:02}", u8::from(month)),
            'd' => write!(out, "{day:02}"),
            'e' => write!(out, "{day:2}"),
            'j' => write!(out, "{:03}", at.ordinal()),
            'H' => write!(out, "{hour:02}"),
            'I' => write!(out, "{:02}", (hour + 11) % 12 + 1),
            'p' => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            'M' => write!(out, "{minute:02}"),
            'S' => write!(out, "{second:02}"),
            'F' => write!(out, "{year:04}-{:02}-{day:02}", u8::from(month)),
            'T' => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            'B' => write!(out, "{month}"),
            'b' | 'h' => write!(out, "{month:.3}"),
            'A' => write!(out, "{}", at.weekday()),
            'a' => write!(out, "{:.3}", at.weekday()),
            'Z' => write!(out, "UTC"),
            'z' => write!(out, "+0000"),
            's' => write!(out, "{seconds}"),
            'f' => write!(out, "{nanoseconds:09}"),
            '%' => write!(out, "%"),
            digit @ '1'..='9' if rest.as_str().starts_with('f') => {
                rest.next();
                let digits = digit.to_digit(10).unwrap_or(9) as usize;
                write!(out, "{}", &format!("{nanoseconds:09}")[..digits])
            }
            other => write!(out, "%{other}"),
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_written_as_asked() {
        let at = |seconds: u64, nanoseconds: u32| UNIX_EPOCH + Duration::new(seconds, nanoseconds);
        for (time, form, expected) in [
            (at(0, 0), DEFAULT, "1970-01-01T00:00:00.000Z"),
            (at(951_827_696, 123_456_789), DEFAULT, "2000-02-29T12:34:56.123Z"),
            (at(951_868_799, 999_999_999), "%F %T.%6f %f", "2000-02-29 23:59:59.999999 999999999"),
            (at(4_107_542_400, 0), "%a %A %d %b %B %y %j", "Mon Monday 01 Mar March 00 060"),
            (at(1_709_251_199, 0), "%I:%M %p %e %j %Z%z", "11:59 PM 29 060 UTC+0000"),
            (at(1_735_603_200, 5), "%s %1f %% %q %H", "1735603200 0 % %q 00"),
            (at(1_735_603_200, 0), "%j%", "366%"),
            (at(0, 0), "%0 %4 é", "%0 %4 é"),
        ] {
            assert_eq!(write(time, form), expected, "{form}");
        }
    }
}
